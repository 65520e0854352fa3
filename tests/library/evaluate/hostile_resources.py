"""Hostile programs against processes, the kernel and limits; see `hostile_programs`."""

PROCESSES = {
    "kills a process of the caller": "os.kill({victim}, 9); escaped()",
    "stops a process of the caller": "os.kill({victim}, 19); escaped()",
    "kills a group of the caller": "os.kill(-{victim}, 9); escaped()",
    "signals by descriptor": "worked(libc.syscall(424, libc.syscall(434, {victim}, 0), 9, 0, 0))",
    "queues a signal": """
        what = ctypes.create_string_buffer(b"\\x09" + b"\\0" * 7 + b"\\xff" * 4, 128)
        worked(kernel(129, 138, {victim}, 9, what))""",
    "signals as owner of a pipe": """
        import fcntl
        r, w = os.pipe()
        fcntl.fcntl(r, fcntl.F_SETOWN, {victim})
        fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b"x"); escaped()""",
    "limits a process of the caller": """
        import resource
        resource.prlimit({victim}, resource.RLIMIT_CPU, (0, 0)); escaped()""",
    "slows a process of the caller": "os.setpriority(os.PRIO_PROCESS, {victim}, 19); escaped()",
    "moves a process of the caller": """
        os.sched_setaffinity({victim}, os.sched_getaffinity({victim})); escaped()""",
    "traces a process of the caller": "worked(libc.ptrace(16, {victim}, 0, 0))",
    "reads memory of the caller": """
        local = ctypes.create_string_buffer(8)
        vector = (ctypes.c_uint64 * 2)(ctypes.addressof(local), 8)
        worked(libc.process_vm_readv({victim}, vector, 1, vector, 1, 0))""",
    "takes descriptors of the caller": """
        worked(libc.syscall(438, libc.syscall(434, {victim}, 0), 0, 0))""",
    "compares processes": "worked(kernel(312, 272, os.getpid(), {victim}, 1, 0, 0))",
    "runs another program": "os.posix_spawn('/bin/true', ['true'], {{}}); escaped()",
    "runs a program from memory": "worked(libc.memfd_create(b'x', 0))",
    "becomes root": """
        for change in (os.setuid, os.seteuid, os.setgid):
            try: change(0); escaped()
            except OSError: pass""",
    "takes capabilities": """
        words = (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6)
        worked(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), words))""",
}
KERNEL = {
    "bpf": "worked(kernel(321, 280, 0, ctypes.create_string_buffer(128), 128))",
    "keys": "worked(kernel(248, 217, b'user', b'x', b'y', 1, -3))",
    "page faults of its own": "worked(kernel(323, 282, 1))",
    "performance counters": """
        wanted = ctypes.create_string_buffer(b"\\1\\0\\0\\0\\x80", 128)
        worked(kernel(298, 241, wanted, 0, -1, -1, 0))""",
    "shared memory that stays": "worked(kernel(29, 194, {shared}, 4096, 0o1666))",
    "message queues": "worked(kernel(240, 180, b'{token}', 0o102, 0o600, None))",
    "personality": "worked(libc.personality(0x40000))",
    "the kernel's log": "worked(libc.klogctl(3, ctypes.create_string_buffer(99), 99))",
    "the host's name": "worked(libc.sethostname(b'x', 1))",
    "the clock": "worked(libc.clock_settime(0, (ctypes.c_long * 2)(1, 1)))",
    "asynchronous I/O": "worked(kernel(206, 0, 8, ctypes.create_string_buffer(8)))",
    "locks memory": "worked(libc.mlockall(1))",
    "writes all disks out": "worked(kernel(306, 267, 0))",
    "the other interface of x86-64": "if not ARM: worked(libc.syscall(0x40000000 | 39))",
    "the 32-bit interface": """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")  # getpid by int 0x80
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        if not ARM and ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0: escaped()""",
}
LIMITS = {
    "forks without end": """
        made = 0
        try:
            while made < 200:
                if not os.fork(): time.sleep(60)
                made += 1
        except OSError: pass
        if made > 50: escaped()""",
    "threads without end": """
        import threading
        made = 0
        try:
            while made < 200:
                threading.Thread(target=time.sleep, args=[60], daemon=True).start()
                made += 1
        except (RuntimeError, MemoryError): pass
        if made > 50: escaped()""",
    "raises its limits": """
        import resource
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC):
            try: resource.setrlimit(kind, (-1, -1)); escaped()
            except (OSError, ValueError): pass""",
    "leaves a process behind": """
        if not os.fork():
            os.setsid()
            if not os.fork():
                time.sleep(600)
            os._exit(0)""",
    "memory of one process": "x = bytearray(2**30); escaped()",
}
MEMORY = {
    "memory of many processes": """
        for _ in range(3):
            if not os.fork(): x = bytearray(200 * 2**20); time.sleep(0.5); os._exit(0)
        codes = [os.wait()[1] for _ in range(3)]
        if codes == [0, 0, 0]: escaped()""",
}
