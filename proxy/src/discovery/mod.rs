//! What the sidecar knows of the mesh, and how it asks for more.

mod mesh;

pub use mesh::{Answer, Mesh};
