//! One line per request or connection, in Istio's formats.
