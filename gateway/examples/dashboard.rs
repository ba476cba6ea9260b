//! Serves the dashboard with summaries read from standard input, one JSON text a line: how its browser
//! tests drive the real page, API and headers. Prints the address; ends when its input does.

use std::io::BufRead as _;
use std::sync::Arc;

use isthmus_gateway::dashboard;
use isthmus_gateway::summary::Summary;
use tokio::net::TcpListener;
use tokio::sync::watch;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let (sender, receiver) = watch::channel(Arc::new(Summary::default()));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let lines = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        println!("http://{address}");
        for line in std::io::stdin().lock().lines() {
            sender.send_replace(Arc::new(serde_json::from_str(&line?)?));
        }
        Ok(())
    });
    let server = axum::serve(listener, dashboard::router(receiver, address.ip()));
    tokio::select! {
        served = server.into_future() => Ok(served?),
        read = lines => read?,
    }
}
