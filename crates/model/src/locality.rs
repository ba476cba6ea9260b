//! Where something runs, and how far two places are apart.

use serde::{Deserialize, Serialize};

/// Region, zone and sub-zone, as Istio writes them (`region/zone/subzone`). Empty parts are unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Locality {
    /// E.g. `eu-west-1`.
    pub region: String,
    /// E.g. `eu-west-1b`.
    pub zone: String,
    /// E.g. a rack.
    pub subzone: String,
}

impl Locality {
    /// Reads `region[/zone[/subzone]]`; further parts are dropped.
    pub fn parse(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        Self { region: next(), zone: next(), subzone: next() }
    }

    /// 0 the same sub-zone, 1 the same zone, 2 the same region, 3 elsewhere or unknown.
    pub fn distance(&self, other: &Self) -> u8 {
        if self.region.is_empty() || self.region != other.region {
            3
        } else if self.zone != other.zone {
            2
        } else if self.subzone != other.subzone {
            1
        } else {
            0
        }
    }
}

impl std::fmt::Display for Locality {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = format!("{}/{}/{}", self.region, self.zone, self.subzone);
        f.pad(text.trim_end_matches('/'))
    }
}
