//! `isthmus export` and `isthmus unexport`: a ServiceExport without writing YAML.

use isthmus_model::{ClusterName, Namespace, ServiceName};
use isthmus_wire::operator::{ApplyRequest, DeleteRequest, File};
use serde_json::json;

use super::apply::report;
use crate::context::{Context, refused};
use crate::failure::{Exit, Failure};
use crate::render;

/// Options of `isthmus export`.
#[derive(Debug, clap::Args)]
pub struct Export {
    #[command(flatten)]
    target: Target,
    /// Clusters that may call it; every one if not given
    #[arg(long, value_delimiter = ',', value_name = "CLUSTER,...")]
    visible_to: Vec<String>,
    /// Check, change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Options of `isthmus unexport`.
#[derive(Debug, clap::Args)]
pub struct Unexport {
    #[command(flatten)]
    target: Target,
    /// Check, change nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
struct Target {
    /// The service: svc/NAME
    #[arg(value_name = "svc/NAME")]
    service: String,
    /// Its namespace
    #[arg(short = 'n', long, default_value = "default")]
    namespace: String,
}

/// Runs `isthmus export`.
///
/// # Errors
/// A name that cannot be one; those of the gateway.
pub async fn export(args: Export, context: &Context) -> Result<(), Failure> {
    let (namespace, name) = args.target.parse()?;
    let file = manifest(&namespace, &name, &args.visible_to)?;
    let request = ApplyRequest { files: vec![file], dry_run: args.dry_run };
    let answer = context.connect().await?.apply(request).await.map_err(refused)?.into_inner();
    report(&answer, args.dry_run, context)?;
    render::note(&format!("Clusters that may call it reach it as http://{name}.{namespace}.svc.clusterset.local"));
    Ok(())
}

/// Runs `isthmus unexport`.
///
/// # Errors
/// As [`export`].
pub async fn unexport(args: Unexport, context: &Context) -> Result<(), Failure> {
    let (namespace, name) = args.target.parse()?;
    let request = DeleteRequest { files: vec![manifest(&namespace, &name, &[])?], dry_run: args.dry_run };
    let answer = context.connect().await?.delete(request).await.map_err(refused)?.into_inner();
    report(&answer, args.dry_run, context)
}

impl Target {
    fn parse(&self) -> Result<(Namespace, ServiceName), Failure> {
        let name = match self.service.split_once('/') {
            None => self.service.as_str(),
            Some(("svc" | "service" | "services", name)) => name,
            Some((kind, _)) => {
                return Err(Failure::new(Exit::Usage, format!("{kind:?} cannot be exported, only services"))
                    .fix("write svc/NAME"));
            }
        };
        let wrong = |what: &str, error: String| Failure::new(Exit::Usage, format!("{what}: {error}"));
        let namespace = self.namespace.parse().map_err(|error| wrong("--namespace", format!("{error}")))?;
        Ok((namespace, name.parse().map_err(|error| wrong("svc/NAME", format!("{error}")))?))
    }
}

/// The ServiceExport that says so. JSON is YAML, and quotes what needs quoting.
fn manifest(namespace: &Namespace, name: &ServiceName, visible_to: &[String]) -> Result<File, Failure> {
    for cluster in visible_to.iter().filter(|cluster| *cluster != "*") {
        cluster.parse::<ClusterName>().map_err(|error| Failure::new(Exit::Usage, format!("--visible-to: {error}")))?;
    }
    let mut object = json!({
        "apiVersion": "multicluster.x-k8s.io/v1beta1",
        "kind": "ServiceExport",
        "metadata": { "namespace": namespace.as_str(), "name": name.as_str() },
    });
    if !visible_to.is_empty() {
        object["metadata"]["annotations"] = json!({ "isthmus.io/visible-to": visible_to.join(",") });
    }
    Ok(File { name: "export".into(), content: object.to_string().into_bytes() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(service: &str) -> Result<(Namespace, ServiceName), Failure> {
        Target { service: service.into(), namespace: "shop".into() }.parse()
    }

    #[test]
    fn a_service_is_named_as_in_kubectl() {
        for text in ["svc/cart", "service/cart", "cart"] {
            assert_eq!(target(text).expect("a service").1.as_str(), "cart", "{text}");
        }
        for text in ["deploy/cart", "svc/", "svc/a/b", "svc/Cart"] {
            assert!(target(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_manifest_says_who_may_call() {
        let (namespace, name) = target("cart").expect("a service");
        let file = manifest(&namespace, &name, &["gcp-us".into(), "onprem".into()]).expect("clusters");
        let text = String::from_utf8(file.content).expect("text");
        assert!(text.contains(r#""isthmus.io/visible-to":"gcp-us,onprem""#), "{text}");
        assert!(manifest(&namespace, &name, &["Gcp US".into()]).is_err());
    }
}
