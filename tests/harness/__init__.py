"""What the tests share: hosts with their daemons and mounts, and checks that nothing is left behind."""
