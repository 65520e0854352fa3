"""System calls: their numbers, and which of them a program may make with which arguments.

Not in the table, and so refused, is what starts other programs, makes sockets, looks into other
processes (``ptrace``, ``process_vm_readv``, ``pidfd_getfd``), enters namespaces, mounts, or reaches
parts of the kernel that a program does not need (``bpf``, ``io_uring_setup``, ``keyctl``,
``memfd_create``, ``userfaultfd``, ``perf_event_open``, shared memory of System V).
"""

from __future__ import annotations

Condition = tuple[int, int, tuple[int, ...]]  # 32-bit word of the arguments, mask, allowed values

# ``name:number on x86-64:number on aarch64``, from the kernel's headers.
_TABLE = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
    pwritev:296:70 lseek:8:62 close:3:57 close_range:436:436 dup:32:23 dup2:33:- dup3:292:24
    pipe:22:- pipe2:293:59 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83
    sendfile:40:71 copy_file_range:326:285 flock:73:32 fadvise64:221:223 fstat:5:80 fstatfs:138:44
    getdents:78:- getdents64:217:61 open:2:- openat:257:56 openat2:437:437 creat:85:- stat:4:-
    lstat:6:- newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439
    readlink:89:- readlinkat:267:78 getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:- mkdirat:258:34
    rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 link:86:-
    linkat:265:37 symlink:88:- symlinkat:266:36 statfs:137:43 umask:95:166 poll:7:- ppoll:271:73
    select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19
    timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87 mmap:9:222 mprotect:10:226
    munmap:11:215 mremap:25:216 brk:12:214 madvise:28:233 msync:26:227 mincore:27:232
    membarrier:324:283 rseq:334:293 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
    rt_sigpending:127:136 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132
    restart_syscall:219:128 alarm:37:- setitimer:38:103 getitimer:36:102 pause:34:-
    nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
    gettimeofday:96:169 time:201:- timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
    timer_getoverrun:225:109 timer_delete:226:111 getpid:39:172 getppid:110:173 gettid:186:178
    getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148
    getresgid:120:150 getgroups:115:158 getpgid:121:155 getpgrp:111:- getsid:124:156 setsid:112:157
    setpgid:109:154 getpriority:140:141 sched_yield:24:124 sched_getaffinity:204:123 getcpu:309:168
    getrlimit:97:163 setrlimit:160:164 getrusage:98:165 sysinfo:99:179 times:100:153 uname:63:160
    getrandom:318:278 capget:125:90 fork:57:- vfork:58:- wait4:61:260 waitid:247:95 exit:60:93
    exit_group:231:94 futex:202:98 futex_waitv:449:449 set_robust_list:273:99
    get_robust_list:274:100 set_tid_address:218:96 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212
    shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209 chmod:90:- fchmod:91:52
    fchmodat:268:53 truncate:76:45 utime:132:- utimes:235:- futimesat:261:- utimensat:280:88
    kill:62:129 tkill:200:130 tgkill:234:131 rt_sigqueueinfo:129:138 clone:56:220 clone3:435:435
    socketpair:53:199 sendto:44:206 ioctl:16:29 prctl:157:167 prlimit64:302:261 fcntl:72:25
"""
NUMBERS = {
    name: tuple(None if number == "-" else int(number) for number in numbers)
    for name, *numbers in (entry.split(":") for entry in _TABLE.split())
}
# Allowed with all arguments: open files, paths, waiting, memory, its own signals and clocks, its
# own processes and threads, connected pairs of sockets.
ALLOWED = """
    read write readv writev pread64 pwrite64 preadv pwritev lseek close close_range dup dup2 dup3
    pipe pipe2 ftruncate fallocate fsync fdatasync sendfile copy_file_range flock fadvise64 fstat
    fstatfs getdents getdents64 open openat openat2 creat stat lstat newfstatat statx access
    faccessat faccessat2 readlink readlinkat getcwd chdir fchdir mkdir mkdirat rmdir unlink
    unlinkat rename renameat renameat2 link linkat symlink symlinkat statfs umask poll ppoll select
    pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd
    eventfd2 timerfd_create timerfd_settime timerfd_gettime mmap mprotect munmap mremap brk madvise
    msync mincore membarrier rseq rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending
    rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall alarm setitimer getitimer pause
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time timer_create
    timer_settime timer_gettime timer_getoverrun timer_delete getpid getppid gettid getuid geteuid
    getgid getegid getresuid getresgid getgroups getpgid getpgrp getsid getpriority
    sched_yield sched_getaffinity getcpu getrlimit setrlimit getrusage sysinfo times uname
    getrandom capget fork vfork wait4 waitid exit exit_group futex futex_waitv set_robust_list
    get_robust_list set_tid_address recvfrom sendmsg recvmsg shutdown getsockname getpeername
    getsockopt
"""
# These change files that a program cannot open: Landlock does not know them.
METADATA = "chmod fchmod fchmodat truncate utime utimes futimesat utimensat"
# Signals to any process that it sees, and leaving the group that is killed at its end.
SIGNALS = "kill tkill tgkill rt_sigqueueinfo setsid setpgid"

NAMESPACES = 0x7E020080  # flags of clone that make new ones
UNIX, STREAM, KIND_OF_SOCKET = 1, 1, 0xF
# Whether it is a terminal and how wide, bytes to read, not blocking, closing on exec.
CONTROLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Copies, flags, locks, size of a pipe. Refused are owners, whom the kernel would send signals.
FILE_CONTROLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1027, 1030, 1032)
NAME_OF_THREAD = (15, 16)  # of prctl: set, get
EVERY_BIT = 0xFFFFFFFF


def conditions(own: int, own_processes: bool) -> dict[str, tuple[Condition, ...]]:
    """Returns the calls that are allowed with some arguments only.

    Args:
      own: the number of the program's process.
      own_processes: whether a program may signal all processes that it sees.
    """
    found: dict[str, tuple[Condition, ...]] = {
        "clone": ((0, NAMESPACES, (0,)),),
        # Connected, so that no message can be sent to a socket that is a file.
        "socketpair": ((0, EVERY_BIT, (UNIX,)), (2, KIND_OF_SOCKET, (STREAM,))),
        "sendto": ((8, EVERY_BIT, (0,)), (9, EVERY_BIT, (0,))),  # no address
        "ioctl": ((2, EVERY_BIT, CONTROLS),),
        "fcntl": ((2, EVERY_BIT, FILE_CONTROLS),),
        "prctl": ((0, EVERY_BIT, NAME_OF_THREAD),),
        "prlimit64": ((0, EVERY_BIT, (0,)),),  # limits of itself
    }
    if not own_processes:
        found |= dict.fromkeys(("kill", "tgkill"), ((0, EVERY_BIT, (own,)),))
    return found
