//! Keys and certificates on disk: directories 0700, files 0600, replaced whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// Largest private file that is read: tables of keys and tokens stay below a tenth of this.
const FILE_LEN_MAX: u64 = 16 << 20;

/// Why a file of the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Reading or writing failed.
    #[error("{}: cannot be {doing}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `written`.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others can read a secret.
    #[error("{}: mode {mode:o} lets others read it; `chmod 600` it, and renew what it holds if others have accounts here", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Its content is not what it should be.
    #[error("{}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// Creates `dir` and its parents, 0700 what is new.
///
/// # Errors
/// [`StateError::Io`].
pub fn create_dir(dir: &Path) -> Result<(), StateError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| StateError::Io {
        path: dir.to_owned(),
        doing: "written",
        source,
    })
}

/// Writes `content` to `path` with mode 0600: to a file beside it first, synced, then renamed.
///
/// # Errors
/// [`StateError::Io`]; the old content stays.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), StateError> {
    let failed = |source| StateError::Io { path: path.to_owned(), doing: "written", source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    // What a crash left there may have another mode, or be a link to elsewhere.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside).map_err(failed)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&beside, path).map_err(failed)?;
    // The rename is durable once the directory is.
    path.parent().map_or(Ok(()), |dir| File::open(dir).and_then(|dir| dir.sync_all())).map_err(failed)
}

/// Reads a file that only its owner may read; `None` if there is none.
///
/// # Errors
/// [`StateError::Exposed`], [`StateError::Io`].
pub fn read_private(path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    let failed = |source| StateError::Io { path: path.to_owned(), doing: "read", source };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    // Asked of the open file, not of the path: the two could be different files.
    let mode = file.metadata().map_err(failed)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(StateError::Exposed { path: path.to_owned(), mode });
    }
    let mut content = Vec::new();
    file.take(FILE_LEN_MAX + 1).read_to_end(&mut content).map_err(failed)?;
    match content.len() as u64 > FILE_LEN_MAX {
        true => Err(StateError::Content { path: path.to_owned(), what: format!("longer than {FILE_LEN_MAX} bytes") }),
        false => Ok(Some(content)),
    }
}

/// Certificates as PEM.
pub fn to_pem(chain: &[CertificateDer<'_>]) -> String {
    use base64::Engine as _;
    let mut text = String::new();
    for certificate in chain {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let body = base64::engine::general_purpose::STANDARD.encode(certificate);
        for line in body.as_bytes().chunks(64) {
            text.push_str(std::str::from_utf8(line).unwrap_or_default());
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

/// Certificates from PEM; `path` is named in errors.
///
/// # Errors
/// [`StateError::Content`] if there is none or one is broken.
pub fn from_pem(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, StateError> {
    let broken = |what: String| StateError::Content { path: path.to_owned(), what };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let chain = chain.map_err(|error| broken(format!("broken certificate: {error}")))?;
    if chain.is_empty() { Err(broken("no certificate in it".into())) } else { Ok(chain) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let dir = std::env::temp_dir().join(format!("isthmus-state-{}", std::process::id()));
        create_dir(&dir).expect("writable");
        let path = dir.join("key");
        write_private(&path, b"secret").expect("writable");
        assert_eq!(read_private(&path).expect("readable").as_deref(), Some(b"secret".as_slice()));
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("own file");
        assert!(matches!(read_private(&path), Err(StateError::Exposed { mode: 0o644, .. })));
        fs::remove_dir_all(&dir).expect("own directory");
    }
}
