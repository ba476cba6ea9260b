//! Envoy's response flags: why a request or connection ended as it did, in two or three letters.

use std::fmt;

/// A set of response flags; empty for a request that simply went through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Flags(u32);

/// Letters by bit. Envoy's order of printing, then our own two.
const LETTERS: [&str; 16] =
    ["UH", "UF", "UO", "NR", "URX", "UC", "UT", "LH", "RL", "UAEX", "DC", "NC", "DPE", "UR", "XT", "XP"];

impl Flags {
    /// Nothing to say.
    pub const NONE: Self = Self(0);
    /// No healthy endpoint.
    pub const UH: Self = Self(1);
    /// The connection to the endpoint failed.
    pub const UF: Self = Self(1 << 1);
    /// A limit of the DestinationRule was hit.
    pub const UO: Self = Self(1 << 2);
    /// No route.
    pub const NR: Self = Self(1 << 3);
    /// Retries or connection attempts used up.
    pub const URX: Self = Self(1 << 4);
    /// The endpoint ended the connection.
    pub const UC: Self = Self(1 << 5);
    /// The request's timeout ran out.
    pub const UT: Self = Self(1 << 6);
    /// The workload failed its health check.
    pub const LH: Self = Self(1 << 7);
    /// Rate limited.
    pub const RL: Self = Self(1 << 8);
    /// Refused by policy.
    pub const UAEX: Self = Self(1 << 9);
    /// The caller ended the connection.
    pub const DC: Self = Self(1 << 10);
    /// The destination is not known.
    pub const NC: Self = Self(1 << 11);
    /// The caller broke the protocol.
    pub const DPE: Self = Self(1 << 12);
    /// The endpoint reset the stream.
    pub const UR: Self = Self(1 << 13);
    /// The tunnel was lost while the request was in it.
    pub const XT: Self = Self(1 << 14);
    /// The destination's cluster is partitioned from ours.
    pub const XP: Self = Self(1 << 15);

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all flags of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for Flags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// As in the access log and in `response_flags`: `UF,URX`, or `-`.
impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (bit, letters) in LETTERS.iter().enumerate() {
            if self.0 & (1 << bit) != 0 {
                f.write_str(if first { "" } else { "," })?;
                f.write_str(letters)?;
                first = false;
            }
        }
        f.write_str(if first { "-" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_print_as_envoy_prints_them() {
        assert_eq!(Flags::NONE.to_string(), "-");
        assert_eq!((Flags::URX | Flags::UF).to_string(), "UF,URX");
        assert_eq!(Flags::XP.to_string(), "XP");
        assert!((Flags::URX | Flags::UF).contains(Flags::UF) && !Flags::UF.contains(Flags::URX));
    }
}
