//! Scenes that several stories share.

use crate::{Story, ms};

/// Builds a scene from a story's name and the sample service's binary.
pub type Scene = fn(&'static str, &'static str) -> Story;

/// `aws-eu` with a shopper, `gcp-us` with an exported cart, 50 ms apart.
pub const TWO_CLOUDS: Scene = |name, sample| {
    Story::new(name, sample)
        .cluster("aws-eu", "eu-west-1/a")
        .cluster("gcp-us", "us-east1/b")
        .rtt("aws-eu", "gcp-us", ms(50))
        .exported("gcp-us", "cart", 1)
        .client("aws-eu", "shopper")
};

/// The same with `onprem`, which also has an exported cart, farther away.
pub const THREE_CLOUDS: Scene = |name, sample| {
    TWO_CLOUDS(name, sample)
        .cluster("onprem", "eu-central/rack-7")
        .rtt("aws-eu", "onprem", ms(20))
        .rtt("gcp-us", "onprem", ms(80))
        .exported("onprem", "cart", 1)
};
