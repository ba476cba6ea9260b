//! What happens to a child between fork and exec: where it is, who it is, with whom it dies.
//!
//! Between fork and exec only system calls are allowed (another thread may hold any lock), so
//! everything that allocates is prepared before.

use std::{
    ffi::CString,
    fs, io,
    net::IpAddr,
    os::unix::ffi::OsStrExt,
    sync::{OnceLock, mpsc},
    thread,
};

/// Runs `start` on the one thread whose death kills the children: it ends with this process.
pub(super) fn on_starter<T: Send + 'static>(start: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    type Job = Box<dyn FnOnce() + Send>;
    static STARTER: OnceLock<Option<mpsc::Sender<Job>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let run = move || inbox.into_iter().for_each(|job| job());
        thread::Builder::new().name("lab-starter".into()).spawn(run).ok().map(|_| jobs)
    });
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (answer, answered) = mpsc::channel();
    let job = Box::new(move || {
        let _ = answer.send(start());
    });
    starter.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
    answered.recv().map_err(|_| gone())?
}

pub(super) fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: both calls only concern the calling process.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before the call: then nobody would send the signal.
        if libc::getppid() as u32 != parent {
            libc::_exit(1);
        }
    }
    Ok(())
}

/// Gives up root for good; keeps the network capabilities across the exec if asked to.
pub(super) fn become_user(id: u32, net_admin: bool) -> io::Result<()> {
    const CAP_NET_BIND_SERVICE: u32 = 10;
    const CAP_NET_ADMIN: u32 = 12;
    const MASK: u32 = 1 << CAP_NET_BIND_SERVICE | 1 << CAP_NET_ADMIN;
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let check = |answer: libc::c_long| if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: system calls on this process, with pointers to locals of the kernel's layout
    // (capget(2): version 3 takes one header and two triples).
    unsafe {
        if net_admin {
            check(libc::prctl(libc::PR_SET_KEEPCAPS, 1).into())?;
        }
        check(libc::setgroups(0, std::ptr::null()).into())?;
        check(libc::setresgid(id, id, id).into())?;
        check(libc::setresuid(id, id, id).into())?;
        if net_admin {
            let header = Header { version: VERSION_3, pid: 0 };
            let low = Sets { effective: MASK, permitted: MASK, inheritable: MASK };
            let sets = [low, Sets { effective: 0, permitted: 0, inheritable: 0 }];
            check(libc::syscall(libc::SYS_capset, &header, &sets))?;
            for capability in [CAP_NET_BIND_SERVICE, CAP_NET_ADMIN] {
                let raise = libc::PR_CAP_AMBIENT_RAISE;
                check(libc::prctl(libc::PR_CAP_AMBIENT, raise, capability as libc::c_ulong, 0, 0).into())?;
            }
        }
    }
    Ok(())
}

/// A `resolv.conf` of one's own, laid over the machine's.
pub(super) struct Resolver {
    file: CString,
}

impl Resolver {
    pub(super) fn prepare(server: IpAddr) -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("isthmus-lab-{}-resolv-{server}", std::process::id()));
        fs::write(&path, format!("nameserver {server}\noptions timeout:1 attempts:2\n"))?;
        Ok(Self { file: CString::new(path.as_os_str().as_bytes())? })
    }

    pub(super) fn mount(&self) -> io::Result<()> {
        let target = c"/etc/resolv.conf";
        let check = |answer: libc::c_int| if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: system calls with NUL-terminated strings that live across them; the mounts are
        // seen by this process only, since its mount namespace is new and private.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS))?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            check(libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()))?;
            check(libc::mount(self.file.as_ptr(), target.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null()))
        }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        // The mount keeps the file's content alive; the name is no longer needed after the exec.
        if let Ok(path) = self.file.to_str() {
            let _ = fs::remove_file(path);
        }
    }
}
