/* The shim's face in Python: lockfs/kernel/_shim.pyi says what each function is for. */
#include "shim.h"

#include <errno.h>
#include <string.h>

static PyObject *module_bind(PyObject *self, PyObject *path)
{
    (void)self;
    PyObject *name;
    if (!PyUnicode_FSConverter(path, &name))
        return NULL;
    const char *missing = shim_bind(PyBytes_AS_STRING(name));
    Py_DECREF(name);
    return Py_BuildValue("z", missing);
}

static PyObject *module_interposed(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyBool_FromLong(shim_interposed());
}

static PyObject *module_configure(PyObject *self, PyObject *args, PyObject *keywords)
{
    (void)self;
    static char *names[] = {"callback", "opcodes", "flags", "max_background", "congestion_threshold", "resume", NULL};
    PyObject *callback;
    unsigned long long opcodes, flags;
    unsigned short max_background, congestion_threshold;
    Py_buffer resume;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OKKHHy*", names, &callback, &opcodes, &flags, &max_background,
                                     &congestion_threshold, &resume))
        return NULL;
    PyObject *result = NULL;
    if (shim.fd >= 0) {
        PyErr_SetString(PyExc_RuntimeError, "the session of this process is still open");
    } else if ((size_t)resume.len > sizeof shim.init) {
        PyErr_SetString(PyExc_ValueError, "that is no INIT request: it is too long");
    } else {
        Py_INCREF(callback);
        Py_XSETREF(shim.callback, callback);
        shim.opcodes = opcodes;
        shim.flags = flags;
        shim.max_background = max_background;
        shim.congestion_threshold = congestion_threshold;
        shim.resuming = resume.len > 0;
        shim.init_size = (size_t)resume.len;
        memset(shim.init, 0, sizeof shim.init);
        memcpy(shim.init, resume.buf, shim.init_size);
        shim.armed = true;
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&resume);
    return result;
}

static PyObject *module_session(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    if (shim.fd < 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(iKy#)", shim.fd, (unsigned long long)shim.granted, shim.init, (Py_ssize_t)shim.init_size);
}

static PyObject *module_failure(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyUnicode_DecodeLocale(shim_failure(), "surrogateescape");
}

static PyObject *module_current(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return Py_BuildValue("(IKO)", shim.opcode, (unsigned long long)shim.unique, shim.kill_suidgid ? Py_True : Py_False);
}

static PyObject *module_reply(PyObject *self, PyObject *args)
{
    (void)self;
    unsigned long long unique;
    int error;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "Kiy*", &unique, &error, &data))
        return NULL;
    /* The range that the kernel accepts (fs/fuse/dev.c). */
    int failed = error < 0 || error > 511 ? EINVAL : shim_reply(unique, error, data.buf, error ? 0 : (size_t)data.len);
    PyBuffer_Release(&data);
    if (failed) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

static PyObject *errno_or_none(int error)
{
    if (!error)
        Py_RETURN_NONE;
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *module_add(PyObject *self, PyObject *args)
{
    (void)self;
    unsigned int number;
    int fd, direct, guarded, calm_only;
    unsigned long long trust;
    if (!PyArg_ParseTuple(args, "IiipKp", &number, &fd, &direct, &guarded, &trust, &calm_only))
        return NULL;
    return errno_or_none(gate_add(number, fd, direct, guarded, trust, calm_only));
}

static PyObject *module_shut(PyObject *self, PyObject *number)
{
    (void)self;
    unsigned long value = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(value <= UINT32_MAX && gate_shut((uint32_t)value));
}

static PyObject *module_remove(PyObject *self, PyObject *number)
{
    (void)self;
    unsigned long value = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(value > UINT32_MAX || gate_remove((uint32_t)value));
}

static PyObject *module_heed(PyObject *self, PyObject *fd)
{
    (void)self;
    long value = PyLong_AsLong(fd);
    if (PyErr_Occurred())
        return NULL;
    return errno_or_none(gate_heed((int)value));
}

static PyMethodDef methods[] = {
    {"bind", module_bind, METH_O, NULL},
    {"interposed", module_interposed, METH_NOARGS, NULL},
    {"configure", (PyCFunction)(void (*)(void))module_configure, METH_VARARGS | METH_KEYWORDS, NULL},
    {"session", module_session, METH_NOARGS, NULL},
    {"failure", module_failure, METH_NOARGS, NULL},
    {"current", module_current, METH_NOARGS, NULL},
    {"reply", module_reply, METH_VARARGS, NULL},
    {"add", module_add, METH_VARARGS, NULL},
    {"shut", module_shut, METH_O, NULL},
    {"remove", module_remove, METH_O, NULL},
    {"heed", module_heed, METH_O, NULL},
    {0},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_shim", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__shim(void)
{
    return PyModule_Create(&definition);
}
