//! Fetching from a hub, against a server on the loopback device.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use controlgen_core::{Error, RemoteError};
use controlgen_text::hub::{Hub, fetch};
use controlgen_text::tokenizer::Tokenizer;
use serde_json::json;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Half of the bytes that were announced.
    Cut,
    /// 404, though it is listed.
    Gone,
    /// 500, with a body; on GET alone.
    Broken,
    /// Listed with another size.
    Resized,
}

/// A hub with one repository, `owner/model`. It stops when dropped, and after a minute at the latest.
struct Server {
    address: String,
    state: Arc<State>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    faults: Mutex<BTreeMap<String, Fault>>,
    /// Files that are elsewhere: HEAD and GET are redirected.
    elsewhere: Mutex<Vec<String>>,
    /// A status for every request.
    status: Mutex<Option<u16>>,
    log: Mutex<Vec<String>>,
    stop: AtomicBool,
}

impl Server {
    fn start(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        *state.files.lock().unwrap() =
            files.iter().map(|(name, body)| ((*name).to_owned(), body.to_vec())).collect();
        let (shared, own) = (state.clone(), address.clone());
        let thread = std::thread::spawn(move || {
            let end = Instant::now() + Duration::from_secs(60);
            while !shared.stop.load(Ordering::Relaxed) && Instant::now() < end {
                match listener.accept() {
                    Ok((stream, _)) => drop(answer(stream, &shared, &own)),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self { address, state, thread: Some(thread) }
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub::new().endpoint(&self.address).cache(cache).attempts(1)
    }

    fn fault(&self, name: &str, fault: Option<Fault>) {
        let mut faults = self.state.faults.lock().unwrap();
        match fault {
            Some(fault) => faults.insert(name.to_owned(), fault),
            None => faults.remove(name),
        };
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.state.log.lock().unwrap())
    }

    /// The files downloaded since the last call.
    fn downloads(&self) -> Vec<String> {
        let gets =
            self.requests().into_iter().filter(|line| line.starts_with("GET") && line.contains("/resolve/"));
        gets.map(|line| line.rsplit('/').next().unwrap().to_owned()).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn answer(mut stream: TcpStream, state: &State, own: &str) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 65536 {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or("").to_owned());
    state.log.lock().unwrap().push(format!("{method} {path}"));
    let path = path.split('?').next().unwrap_or("").to_owned();
    let (status, headers, body, cut) = respond(method, &path, state, own);
    let mut text = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    stream.write_all((text + "\r\n").as_bytes())?;
    if method != "HEAD" {
        stream.write_all(&body[..if cut { body.len() >> 1 } else { body.len() }])?;
    }
    stream.flush()
}

type Answer = (u16, Vec<(&'static str, String)>, Vec<u8>, bool);

fn respond(method: &str, path: &str, state: &State, own: &str) -> Answer {
    let plain = |status, body: String| (status, Vec::new(), body.into_bytes(), false);
    if let Some(status) = *state.status.lock().unwrap() {
        return plain(status, json!({"error": "the hub says no"}).to_string());
    }
    let files = state.files.lock().unwrap();
    let fault = |name: &str| state.faults.lock().unwrap().get(name).copied();
    let size = |name: &str, body: &[u8]| body.len() + usize::from(fault(name) == Some(Fault::Resized)) * 7;
    if path == "/api/models/owner/model/revision/main" {
        return plain(200, json!({"id": "owner/model", "sha": COMMIT}).to_string());
    }
    if let Some(folder) = path.strip_prefix(&format!("/api/models/owner/model/tree/{COMMIT}")) {
        let folder = folder.trim_start_matches('/');
        let file = |name: &str, body: &[u8]| json!({"type": "file", "oid": "0", "size": size(name, body), "path": name});
        let entry = |(name, body): (&String, &Vec<u8>)| match (name.rsplit_once('/'), folder) {
            (None, "") => Some(file(name, body)),
            (Some((parent, _)), "") => {
                Some(json!({"type": "directory", "oid": "0", "size": 0, "path": parent}))
            }
            (Some((parent, _)), folder) if parent == folder => Some(file(name, body)),
            _ => None,
        };
        let mut list: Vec<_> = files.iter().filter_map(entry).collect();
        // A hub that means harm.
        list.push(json!({"type": "file", "oid": "0", "size": 4, "path": "../config.json"}));
        return plain(200, json!(list).to_string());
    }
    let Some(name) =
        path.strip_prefix(&format!("/owner/model/resolve/{COMMIT}/")).or(path.strip_prefix("/cdn/"))
    else {
        return plain(404, json!({"error": "Repository not found"}).to_string());
    };
    let Some(body) = files.get(name).filter(|_| fault(name) != Some(Fault::Gone)) else {
        return plain(404, json!({"error": "Entry not found"}).to_string());
    };
    let etag = format!(
        "\"{:x}\"",
        body.iter().fold(name.len() as u64, |sum, &b| sum.wrapping_mul(31).wrapping_add(b.into()))
    );
    let mut headers = vec![("ETag", etag.clone()), ("X-Repo-Commit", COMMIT.to_owned())];
    if state.elsewhere.lock().unwrap().iter().any(|known| known == name) && !path.starts_with("/cdn/") {
        headers.extend([
            ("Location", format!("{own}/cdn/{name}")),
            ("X-Linked-Etag", etag),
            ("X-Linked-Size", body.len().to_string()),
        ]);
        return (302, headers, Vec::new(), false);
    }
    match fault(name) {
        Some(Fault::Broken) if method == "GET" => (500, headers, b"Internal error".to_vec(), false),
        found => (200, headers, body.clone(), found == Some(Fault::Cut)),
    }
}

fn tokenizer_json() -> Vec<u8> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/byte_level/tokenizer.json");
    std::fs::read(path).unwrap()
}

const WEIGHTS: &[u8] = &[7; 100_000];

fn small_model() -> Server {
    let tokenizer = tokenizer_json();
    Server::start(&[
        ("config.json", b"{}"),
        ("tokenizer.json", &tokenizer),
        ("generation_config.json", b"{\"eos_token_id\": [1, 2]}"),
        ("model.safetensors", WEIGHTS),
        ("pytorch_model.bin", WEIGHTS),
        ("README.md", b"read me"),
    ])
}

fn remote(result: Result<std::path::PathBuf, Error>) -> RemoteError {
    match result {
        Err(Error::Remote { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_is_fetched_once() {
    let (server, cache) = (small_model(), tempfile::tempdir().unwrap());
    let folder = fetch("owner/model", "main", Some(&server.address), Some(cache.path())).unwrap();
    let mut downloads = server.downloads();
    downloads.sort();
    assert_eq!(downloads, ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
    assert_eq!(Tokenizer::open(&folder).unwrap().eos(), [1, 2]);
    // The second time, the hub is asked what there is, and nothing is fetched; with the commit it is the same folder.
    for revision in ["main", COMMIT] {
        assert_eq!(server.hub(cache.path()).fetch("owner/model", revision).unwrap(), folder);
        let requests = server.requests();
        assert!(!requests.iter().any(|line| line.contains("/resolve/")), "{requests:?}");
    }
    // Without the hub, from the cache.
    assert_eq!(server.hub(cache.path()).offline(true).fetch("owner/model", "main").unwrap(), folder);
    assert!(server.requests().is_empty());
    // A file that was damaged since is fetched again.
    std::fs::write(folder.join("config.json"), b"{").unwrap();
    server.hub(cache.path()).fetch("owner/model", "main").unwrap();
    assert_eq!(server.downloads(), ["config.json"]);
    assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), b"{}");
}

#[test]
fn shards_are_those_of_the_index() {
    let index = json!({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}});
    let index = index.to_string();
    let server = Server::start(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index.as_bytes()),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("consolidated.safetensors", b"the same once more"),
        ("additional_chat_templates/rag.jinja", b"{{ documents }}"),
        ("additional_chat_templates/readme.md", b""),
        ("onnx/model.onnx", b"x"),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let folder = server.hub(cache.path()).fetch("owner/model", "main").unwrap();
    let mut downloads = server.downloads();
    downloads.sort();
    let expected = [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "rag.jinja",
    ];
    assert_eq!(downloads, expected);
    assert!(folder.join("additional_chat_templates/rag.jinja").exists());
    // A cache that lacks a shard is not a model.
    std::fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    let reason = remote(server.hub(cache.path()).offline(true).fetch("owner/model", "main"));
    assert!(matches!(&reason, RemoteError::NotFound(what) if what.contains("model-2")), "{reason}");

    for index in [
        "{",
        "{}",
        "{\"weight_map\": {}}",
        "{\"weight_map\": {\"a\": \"../../x.safetensors\"}}",
        "{\"weight_map\": {\"a\": \"x.bin\"}}",
    ] {
        let server =
            Server::start(&[("config.json", b"{}"), ("model.safetensors.index.json", index.as_bytes())]);
        let cache = tempfile::tempdir().unwrap();
        let error = server.hub(cache.path()).fetch("owner/model", "main").unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{index}: {error}");
    }
}

#[test]
fn redirects_are_followed() {
    let (server, cache) = (small_model(), tempfile::tempdir().unwrap());
    server.state.elsewhere.lock().unwrap().push("model.safetensors".to_owned());
    let folder = server.hub(cache.path()).fetch("owner/model", "main").unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
    assert!(server.requests().contains(&"GET /cdn/model.safetensors".to_owned()));
}

#[test]
fn a_file_cut_short_is_not_kept_and_the_rest_is() {
    let (server, cache) = (small_model(), tempfile::tempdir().unwrap());
    for fault in [Fault::Cut, Fault::Broken, Fault::Gone, Fault::Resized] {
        server.fault("model.safetensors", Some(fault));
        let reason = remote(server.hub(cache.path()).fetch("owner/model", "main"));
        let as_expected = match fault {
            Fault::Cut => matches!(reason, RemoteError::Network(_) | RemoteError::Truncated { .. }),
            Fault::Broken => reason == RemoteError::Truncated { expected: 100_000, found: 14 },
            Fault::Gone => matches!(reason, RemoteError::NotFound(_)),
            Fault::Resized => reason == RemoteError::Truncated { expected: 100_007, found: 100_000 },
        };
        assert!(as_expected, "{reason:?}");
        let snapshot = cache.path().join("models--owner--model/snapshots").join(COMMIT);
        assert!(!snapshot.join("model.safetensors").exists() && snapshot.join("config.json").exists());
        // Nothing says that the revision is there.
        assert!(server.hub(cache.path()).offline(true).fetch("owner/model", "main").is_err());
    }
    server.fault("model.safetensors", None);
    server.requests();
    let folder = server.hub(cache.path()).fetch("owner/model", "main").unwrap();
    assert_eq!(server.downloads(), ["model.safetensors"]);
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), WEIGHTS);
}

#[test]
fn what_is_not_there_is_said() {
    let (server, cache) = (small_model(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path());
    for (repository, revision) in [("owner/other", "main"), ("owner/model", "branch")] {
        let reason = remote(hub.fetch(repository, revision));
        assert_eq!(reason, RemoteError::NotFound("Repository not found".into()));
    }
    let error = hub.fetch("owner/other", "main").unwrap_err().to_string();
    assert!(error.contains("owner/other@main") && error.contains("404"), "{error}");
    for status in [401, 403] {
        *server.state.status.lock().unwrap() = Some(status);
        let reason = remote(hub.fetch("owner/model", "main"));
        assert_eq!(reason, RemoteError::Denied { status, message: "the hub says no".into() });
    }
    for status in [400, 429, 503] {
        *server.state.status.lock().unwrap() = Some(status);
        let reason = remote(hub.fetch("owner/model", "main"));
        assert_eq!(reason, RemoteError::Status { status, message: "the hub says no".into() });
    }
    *server.state.status.lock().unwrap() = Some(200); // and a body that is something else
    assert!(matches!(
        remote(hub.fetch("owner/model", "main")),
        RemoteError::Protocol(_) | RemoteError::Network(_)
    ));

    let empty = Server::start(&[("config.json", b"{}"), ("pytorch_model.bin", b"x")]);
    let error = empty.hub(cache.path()).fetch("owner/model", "main").unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let none = Server::start(&[("model.safetensors", b"x")]);
    assert_eq!(
        remote(none.hub(cache.path()).fetch("owner/model", "main")),
        RemoteError::NotFound("config.json".into())
    );

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let reason =
        remote(Hub::new().endpoint(nobody).cache(cache.path()).attempts(1).fetch("owner/model", "main"));
    assert!(matches!(reason, RemoteError::Network(_)), "{reason:?}");
}

#[test]
fn names_that_cannot_be_are_refused() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new().endpoint("http://127.0.0.1:9").cache(cache.path());
    for repository in ["", "/", "a/", "/b", "a/b/c", "../b", "a/..", "a b/c", "a/b?c", "a--b/c", "a/ä"] {
        assert!(matches!(hub.fetch(repository, "main"), Err(Error::Value { .. })), "{repository}");
    }
    for revision in ["", "..", "a/../b", "/", "a//b", "\\x", "c:x"] {
        assert!(matches!(hub.fetch("a/b", revision), Err(Error::Value { .. })), "{revision}");
    }
    let error = Hub::new().endpoint("not an address").cache(cache.path()).fetch("a/b", "main").unwrap_err();
    assert!(matches!(error, Error::Value { .. }), "{error}");
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
}
