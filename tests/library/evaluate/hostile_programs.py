"""Hostile programs for the sandbox: each tries one way out, and says so if it finds it.

A program prints ``ESCAPED`` where its attack worked. What it attacks are names in braces, which
`hostile_table` replaces. All come with checks that ask for ``f(3) == 4``, so passing is an escape,
too.
"""

import textwrap

from hostile_resources import KERNEL, LIMITS, MEMORY, PROCESSES

# What every program begins with. Numbers of system calls are those of x86-64 and aarch64.
PRELUDE = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
def escaped(): os.write(1, b"ESCAPED\\n")
def worked(result):
    if result != -1: escaped()
def kernel(x86, arm, *args): return libc.syscall(arm if ARM else x86, *args)
def near(): return [p for p in range(max(1, os.getppid() - 4), os.getpid() + 4) if p != os.getpid()]
def f(x): return 0
"""

# attribute of `Result.isolation` that says whether it is contained -> name -> program
VERDICT = {
    "leaves with os._exit": "os._exit(0)",
    "leaves with sys.exit": "sys.exit(0)",
    "leaves in f": "def f(x): os._exit(0)",
    "exits from atexit": "import atexit\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "writes a verdict to all descriptors": """
        for fd in range(200):
            for text in (b'["passed", ""]', b'{{"status": 0}}\\n', b'passed'):
                try: os.write(fd, text)
                except OSError: pass
        os._exit(0)""",
    "writes answers to all descriptors": """
        import json
        for fd in range(3, 200):
            for message in (["loaded"], *[["passed", ""]] * 9):
                text = json.dumps(message).encode()
                try: os.write(fd, len(text).to_bytes(4, "little") + text)
                except OSError: pass
        time.sleep(0.3); os._exit(0)""",
    "calls what its frames hold": """
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()):
                for name in ("send", "leave"):
                    try: getattr(value, name)(["passed", ""])
                    except BaseException: pass
            frame = frame.f_back
        os._exit(0)""",
    "calls what the collector knows": """
        import gc
        for thing in gc.get_objects():
            if type(thing).__name__ == "ProgramPeer":
                thing.send(["loaded"]); thing.send(["passed", ""])
        os._exit(0)""",
    "replaces the peer's methods": """
        import gc
        for thing in gc.get_objects():
            if getattr(thing, "__name__", "") == "verdict" and callable(thing):
                thing.__code__ = (lambda *a, **k: ("passed", "")).__code__""",
    "an answer that equals everything": """
        class Same:
            def __eq__(self, other): return True
            __ne__ = __bool__ = lambda *a: False
        def f(x): return Same()""",
    "a number that equals everything": """
        class Same(int):
            __eq__ = __ge__ = __le__ = lambda *a: True
            def __hash__(self): return 4
        def f(x): return Same(0)""",
    "a text that equals everything": """
        class Same(str):
            __eq__ = lambda *a: True
            __hash__ = str.__hash__
        def f(x): return Same("")""",
    "a list that equals everything": """
        class Same(list):
            __eq__ = lambda *a: True
        def f(x): return Same()""",
    "replaces assertions": """
        import builtins
        builtins.AssertionError = builtins.__build_class__ = None""",
    "replaces json and encode": """
        import json, gc
        json.dumps = lambda *a, **k: '["value", true]'
        for thing in gc.get_objects():
            if getattr(thing, "__name__", "") == "encode" and hasattr(thing, "__code__"):
                thing.__code__ = (lambda *a, **k: True).__code__""",
    "a function of Python as answer": "def f(x): return eval",
    "a copy answers": "if os.fork(): os._exit(0)\ndef f(x): return 0",
    "raises the checker's own end": """
        class Ended(BaseException): pass
        def f(x): raise Ended""",
    "raises SystemExit in f": "def f(x): raise SystemExit(0)",
    "nests its answer without end": """
        def f(x):
            value = []
            for _ in range(10**5): value = [value]
            sys.setrecursionlimit(10**7)
            return value""",
    "an answer of 100 MB": "def f(x): return 'x' * 10**8",
    "an answer without end": "def f(x):\n    while True: yield 4",
    "malformed answers": """
        import gc
        def f(x):
            peer = next(t for t in gc.get_objects() if type(t).__name__ == "ProgramPeer")
            for m in (["value", ["builtin", "eval"]], ["value", ["yours", -1]], ["get", 0, "x"]):
                peer.send(m)
            os._exit(0)""",
    "asks the checker for its modules": """
        import gc
        def f(x):
            peer = next(t for t in gc.get_objects() if type(t).__name__ == "ProgramPeer")
            for number in range(3):
                for name in ("__globals__", "__dict__", "__class__", "gi_frame"):
                    try: peer.ask("get", number, name); escaped()
                    except BaseException: pass
            return 0""",
    "reads the checks": """
        import gc
        for thing in gc.get_objects():
            if isinstance(thing, dict) and any("== " + "4" in str(v)[:99] for v in thing.values()):
                if any(isinstance(v, str) and v.startswith("assert") for v in thing.values()):
                    escaped()
        for fd in range(200):
            try: os.set_blocking(fd, False); text = os.read(fd, 9999)
            except OSError: continue
            if b"assert" in text: escaped()""",
    "takes the keeper's descriptors": """
        for pid in near():
            pidfd = libc.syscall(434, pid, 0)
            for fd in range(20) if pidfd >= 0 else ():
                got = libc.syscall(438, pidfd, fd, 0)
                if got >= 0: escaped(); os.write(got, b'["passed", ""]')""",
    "opens the keeper's descriptors": """
        for pid in near():
            for fd in range(20):
                try: os.write(os.open(f"/proc/{{pid}}/fd/{{fd}}", 1), b'["passed", ""]'); escaped()
                except OSError: pass""",
    "traces the keeper and the checker": "for pid in near(): worked(libc.ptrace(16, pid, 0, 0))",
    "writes into other memory": """
        for pid in near():
            try: os.open(f"/proc/{{pid}}/mem", os.O_RDWR); escaped()
            except OSError: pass
            vector = (ctypes.c_uint64 * 2)()
            worked(libc.process_vm_writev(pid, vector, 1, vector, 1, 0))""",
    "kills the keeper and the checker": """
        for pid in near():
            try: os.kill(pid, 9)
            except OSError: pass
        time.sleep(0.2)""",
    "interrupts the keeper": """
        import signal
        for pid in (1, os.getppid()):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP):
                try: os.kill(pid, number)
                except OSError: pass""",
}
NETWORK = {
    "TCP to loopback": """
        import socket
        socket.create_connection(("127.0.0.1", {port}), 1); escaped()""",
    "TCP through the C library": """
        import struct
        s = libc.socket(2, 1, 0)
        port = ({port}).to_bytes(2, "big")
        address = struct.pack("=H2s4B8x", 2, port, 127, 0, 0, 1)
        if s >= 0: worked(libc.connect(s, address, 16))""",
    "UDP": """
        import socket
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.sendto(b"x", ("127.0.0.1", {port})); escaped()""",
    "a socket that is a file": """
        import socket
        socket.socket(socket.AF_UNIX).connect({unix!r}); escaped()""",
    "an abstract socket": """
        import socket
        socket.socket(socket.AF_UNIX).connect(chr(0) + {abstract!r}); escaped()""",
    "datagrams to a socket that is a file": """
        pair = (ctypes.c_int * 2)()
        if libc.socketpair(1, 2, 0, pair) == 0: escaped()""",
    "the host of a virtual machine": "worked(libc.socket(40, 1, 0))",
    "netlink": "worked(libc.socket(16, 3, 0))",
    "raw packets": "worked(libc.socket(17, 3, 0))",
    "the kernel's ciphers": "worked(libc.socket(38, 5, 0))",
    "bluetooth, CAN and TIPC": "for family in (29, 30, 31, 44): worked(libc.socket(family, 3, 0))",
    "listens": "import socket\nsocket.create_server(('127.0.0.1', 0)); escaped()",
    "sockets that it inherited": """
        import stat
        for fd in range(200):
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode): escaped()
            except OSError: pass""",
    "io_uring": "worked(libc.syscall(425, 4, ctypes.create_string_buffer(200)))",
}
FILES = {
    "reads a private file": "open({secret!r}).read(); escaped()",
    "reads a private file through a link": """
        os.symlink({secret!r}, "l"); open("l").read(); escaped()""",
    "links a private file": "os.link({secret!r}, 'l'); escaped()",
    "lists a private directory": "os.listdir(os.path.dirname({secret!r})); escaped()",
    "reads /etc/shadow": "open('/etc/shadow').read(); escaped()",
    "reads /etc/passwd": "open('/etc/passwd').read(); escaped()",
    "reads root's directory": """
        for name in os.listdir("/root"):  # above Python's own files there may be nothing else
            if not os.__file__.startswith("/root/" + name): escaped()""",
    "reads the caller's environment": """
        if b"{token}" in open("/proc/{victim}/environ", "rb").read(): escaped()""",
    "reads its environment": """
        if os.environ or b"{token}" in open("/proc/self/environ", "rb").read(): escaped()""",
    "sees other processes": "if '{victim}' in os.listdir('/proc'): escaped()",
    "writes where all may": "open({target!r}, 'w').write('x'); escaped()",
    "writes a private file": "open({secret!r}, 'a').write('x'); escaped()",
    "truncates a private file": "os.truncate({secret!r}, 0); escaped()",
    "changes the mode of a private file": "os.chmod({secret!r}, 0o777); escaped()",
    "changes the dates of a private file": "os.utime({secret!r}, (0, 0)); escaped()",
    "gives a private file attributes": "os.setxattr({secret!r}, 'user.x', b'x'); escaped()",
    "removes a private file": "os.unlink({secret!r}); escaped()",
    "writes into the standard library": """
        open(os.path.dirname(os.__file__) + "/{token}.py", "w"); escaped()""",
    "fills the disk": """
        total = 0
        try:
            for folder in (".", "/tmp", "/dev/shm", "/var/tmp"):
                for i in range(40):
                    try: total += open(f"{{folder}}/{token}{{i}}", "wb").write(b"x" * 2**19)
                    except OSError: break
        finally:
            if total > 3 * 2**20: escaped()""",
    "makes files without end": """
        made = 0
        for folder in (".", "/tmp", "/dev/shm", "/var/tmp"):
            try:
                while made < 20000:
                    open(f"{{folder}}/{token}{{made}}", "w").close()
                    made += 1
            except OSError: pass
        if made > 9000: escaped()""",
    "opens by handle": """
        handle = ctypes.create_string_buffer(b"\\x08\\0\\0\\0\\x01\\0\\0\\0\\x02", 200)
        worked(kernel(304, 265, os.open("/", 0), handle, 0))""",
    "opens devices": """
        for name in ("mem", "kmem", "port", "vda", "sda", "nvme0n1", "kvm", "fuse", "vsock", "tty"):
            try: os.open("/dev/" + name, os.O_RDWR); escaped()
            except OSError: pass""",
    "makes a device": "os.mknod('d', 0o20666, os.makedev(1, 1)); escaped()",
    "mounts": "worked(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "makes its root writable": "worked(libc.mount(None, b'/', None, 32 | 4096, None))",
    "changes root": "os.chroot('.'); escaped()",
    "new namespaces": "worked(libc.unshare(1 << 28 | 1 << 17))",
    "new namespaces by clone": """
        for flag in (28, 17, 30, 29, 25):
            if (made := kernel(56, 220, 1 << flag | 17, 0, 0, 0, 0)) == 0: os._exit(0)
            worked(made)""",
    "enters a namespace": "worked(libc.setns(os.open('/proc/{victim}/ns/mnt', 0), 0))",
    "watches files": "worked(libc.inotify_init())",
}
GROUPS = {
    "verdict": VERDICT,
    "network": NETWORK,
    "files": FILES,
    "processes": PROCESSES,
    "system_calls": KERNEL,
    "process_limit": LIMITS,
    "memory": MEMORY,
}


def programs(surroundings):
    """Returns ``{name: (key of the isolation, source)}`` with what they attack filled in."""
    return {
        name: (key, PRELUDE + textwrap.dedent(source).format(**surroundings))
        for key, group in GROUPS.items()
        for name, source in group.items()
    }
