# A guest in one boot sector: it writes sector after sector of its disk, reads each back and compares, for ever.
#
# Sector 64 + n % 1024 gets 256 times the word n.  Every 16 sectors it writes a P to its serial port, after an error an E,
# and then it halts.
        .code16
        .globl  _start
_start: ljmp    $0, $begin
begin:  xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     $0x7c00, %sp
        cld
        mov     %dl, drive
next:   incw    count
        mov     count, %ax
        mov     $0x8000, %di
        mov     $256, %cx
        rep     stosw
        mov     count, %ax
        and     $1023, %ax
        add     $64, %ax
        mov     %ax, sector
        movw    $0x8000, buffer
        mov     $0x4300, %ax            # extended write
        call    disk
        movw    $0x9000, buffer
        mov     $0x4200, %ax            # extended read
        call    disk
        mov     $0x8000, %si
        mov     $0x9000, %di
        mov     $256, %cx
        repe    cmpsw
        jne     fail
        testw   $15, count
        jnz     next
        mov     $'P', %al
        call    put
        jmp     next

disk:   mov     $packet, %si
        mov     drive, %dl
        int     $0x13
        jc      fail
        ret

fail:   mov     $'E', %al
        call    put
        cli
halt:   hlt
        jmp     halt

put:    mov     $0x3f8, %dx
        out     %al, %dx
        ret

drive:  .byte   0
count:  .word   0
packet: .byte   16, 0
        .word   1
buffer: .word   0x8000, 0
sector: .quad   0

        .org    510
        .word   0xaa55
