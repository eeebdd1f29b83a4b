//! A plane's admin socket as far as a client sees it: HTTP on a Unix socket, with answers that a test gives.
#![allow(dead_code, reason = "each test file uses its part")]

use crate::tool::Dir;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

pub struct Plane {
    pub socket: PathBuf,
    answers: Arc<Mutex<HashMap<String, (u16, String)>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Plane {
    /// Listens at `admin.sock` of this directory until the test's process ends.
    pub fn start(dir: &Dir) -> Self {
        let socket = dir.path("admin.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let plane = Self { socket, answers: Arc::default(), asked: Arc::default() };
        let (answers, asked) = (plane.answers.clone(), plane.asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), &answers, &asked);
            }
        });
        plane
    }

    /// To a request like `GET /v1/status`.
    pub fn answers(&self, request: &str, status: u16, body: impl ToString) {
        self.answers.lock().unwrap().insert(request.to_owned(), (status, body.to_string()));
    }

    /// The requests since this was last called.
    pub fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

/// One request, then the connection ends.
fn serve(stream: UnixStream, answers: &Mutex<HashMap<String, (u16, String)>>, asked: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(&stream);
    let mut request = String::new();
    let mut line = String::new();
    while reader.read_line(&mut line).unwrap() > 2 {
        if request.is_empty() {
            request = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
        }
        line.clear();
    }
    asked.lock().unwrap().push(request.clone());
    let answer = answers.lock().unwrap().get(&request).cloned();
    // Without an answer it hangs up.
    if let Some((status, body)) = answer {
        let head = format!("HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {}", body.len());
        let _ = write!(&stream, "{head}\r\nconnection: close\r\n\r\n{body}");
    }
}
