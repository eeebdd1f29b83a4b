use super::*;
use crate::host::aws::LARGEST_ANSWER;
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::hmac;
use onboarding_core::identity::Thumbprint;
use onboarding_wire::onboarding::SignedCallerIdentity;
use onboarding_wire::proof::sts_binding;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// A metadata service on loopback that wants IMDSv2 tokens; what it answers can be changed.
struct Service {
    address: SocketAddr,
    answers: Arc<Mutex<BTreeMap<String, (u16, String)>>>,
    task: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const CREDENTIALS: &str = r#"{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"secret","Token":"session/token+=","Expiration":"2026-11-24T17:00:00Z"}"#;

impl Service {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answers: BTreeMap<_, _> = [
            (DOCUMENT, "MIAGCSqGSIb3DQEHAqCAMIACAQExDzAN"),
            (REGION, "us-east-2"),
            (INSTANCE_CREDENTIALS, CREDENTIALS),
            (ROLES, "ratings-role"),
            ("/latest/meta-data/iam/security-credentials/ratings-role", CREDENTIALS),
            (PRIVATE_ADDRESS, "10.0.0.4"),
            (PUBLIC_ADDRESS, "52.1.2.3"),
        ]
        .into_iter()
        .map(|(path, text)| (path.to_owned(), (200, text.to_owned())))
        .collect();
        let answers = Arc::new(Mutex::new(answers));
        let task = tokio::spawn(serve(listener, answers.clone()));
        Self { address, answers, task }
    }

    fn answer(&self, path: &str, status: u16, text: &str) {
        self.answers.lock().unwrap().insert(path.to_owned(), (status, text.to_owned()));
    }
}

async fn serve(listener: TcpListener, answers: Arc<Mutex<BTreeMap<String, (u16, String)>>>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let answers = answers.clone();
        tokio::spawn(async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                    return;
                }
                request.push(byte[0]);
            }
            let request = String::from_utf8(request).unwrap().to_ascii_lowercase();
            let path = request.split(' ').nth(1).unwrap().to_owned();
            let (status, text) = if request.starts_with("put /latest/api/token ") {
                if request.contains("x-aws-ec2-metadata-token-ttl-seconds: 300") {
                    (200, "the-token".to_owned())
                } else {
                    (400, String::new())
                }
            } else if !request.contains("x-aws-ec2-metadata-token: the-token") {
                (401, String::new())
            } else {
                answers.lock().unwrap().get(&path).cloned().unwrap_or((404, "not found".to_owned()))
            };
            let answer =
                format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}", text.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
    }
}

fn audience() -> Audience {
    Audience { plane_uid: "uid".to_owned(), challenge: vec![7; 32], key: Thumbprint([9; 32]) }
}

fn now() -> Timestamp {
    "2026-11-24T11:00:00Z".parse().unwrap()
}

async fn credential(metadata: &Service) -> Result<AwsEc2Credential, String> {
    let evidence = Ec2::new(metadata.address).evidence(&audience(), now()).await.map_err(|error| error.to_string())?;
    assert_eq!(evidence.credential.type_url, AWS_EC2_CREDENTIAL);
    Ok(AwsEc2Credential::decode(evidence.credential.value.as_slice()).unwrap())
}

/// SigV4 of the request that the proto's comment describes, from its specification and nothing of the code under test.
fn signature(region: &str, secret: &str, token: &str, binding: &str) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mac = |key: &[u8], data: &str| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), data.as_bytes());
    let body = hex(digest(&SHA256, b"Action=GetCallerIdentity&Version=2011-06-15").as_ref());
    let canonical = format!(
        "POST\n/\n\ncontent-type:application/x-www-form-urlencoded; charset=utf-8\nhost:sts.{region}.amazonaws.com\nx-amz-date:20261124T110000Z\nx-amz-security-token:{token}\nx-onboarding-binding:{binding}\n\ncontent-type;host;x-amz-date;x-amz-security-token;x-onboarding-binding\n{body}"
    );
    let scope = format!("20261124/{region}/sts/aws4_request");
    let to_sign =
        format!("AWS4-HMAC-SHA256\n20261124T110000Z\n{scope}\n{}", hex(digest(&SHA256, canonical.as_bytes()).as_ref()));
    let mut key = format!("AWS4{secret}").into_bytes();
    for part in ["20261124", region, "sts", "aws4_request"] {
        key = mac(&key, part).as_ref().to_vec();
    }
    hex(mac(&key, &to_sign).as_ref())
}

#[tokio::test]
async fn evidence_is_the_document_and_two_signed_requests() {
    let metadata = Service::start().await;
    let credential = credential(&metadata).await.unwrap();
    assert_eq!(credential.identity_document, "MIAGCSqGSIb3DQEHAqCAMIACAQExDzAN");
    let binding = sts_binding("uid", &[7; 32], Thumbprint([9; 32]));
    let expected = SignedCallerIdentity {
        region: "us-east-2".to_owned(),
        amz_date: "20261124T110000Z".to_owned(),
        access_key_id: "ASIAEXAMPLE".to_owned(),
        session_token: "session/token+=".to_owned(),
        signature: signature("us-east-2", "secret", "session/token+=", &binding),
    };
    assert_eq!(credential.instance.as_ref(), Some(&expected));
    assert_eq!(credential.role.as_ref(), Some(&expected));
}

#[tokio::test]
async fn an_instance_without_a_role_or_a_public_address_says_so() {
    let metadata = Service::start().await;
    for path in [ROLES, INSTANCE_CREDENTIALS, PUBLIC_ADDRESS] {
        metadata.answer(path, 404, "not found");
    }
    let credential = credential(&metadata).await.unwrap();
    assert!(credential.role.is_none() && credential.instance.is_none());
    let addresses = Ec2::new(metadata.address).addresses().await.unwrap();
    assert_eq!(addresses, [HostAddress { ip: "10.0.0.4".parse().unwrap(), kind: ConnectedOver::Vpc }]);
}

#[tokio::test]
async fn the_public_address_comes_from_the_metadata() {
    let metadata = Service::start().await;
    let addresses = Ec2::new(metadata.address).addresses().await.unwrap();
    assert_eq!(addresses.len(), 2);
    assert_eq!(addresses[1], HostAddress { ip: "52.1.2.3".parse().unwrap(), kind: ConnectedOver::Internet });
}

#[tokio::test]
async fn answers_that_make_no_sense_are_refused() {
    for (path, status, text, words) in [
        (DOCUMENT, 500, "", "rsa2048 with 500"),
        (REGION, 200, "us-east-2.evil.example/", "not a region"),
        (ROLES, 200, "../../dynamic", "not a role's name"),
        (INSTANCE_CREDENTIALS, 200, "<html>", "not credentials in JSON"),
        (INSTANCE_CREDENTIALS, 500, "", "with 500"),
    ] {
        let metadata = Service::start().await;
        metadata.answer(path, status, text);
        let error = credential(&metadata).await.unwrap_err();
        assert!(error.contains(words), "{path}: {error}");
    }
    let metadata = Service::start().await;
    metadata.answer(INSTANCE_CREDENTIALS, 200, &CREDENTIALS.replace("Success", "AssumeRoleUnauthorizedAccess"));
    assert!(credential(&metadata).await.unwrap_err().contains("Code is not Success"));
    metadata.answer(DOCUMENT, 200, &"x".repeat(LARGEST_ANSWER + 1));
    assert!(credential(&metadata).await.unwrap_err().contains("can't be understood"));
    metadata.answer(PRIVATE_ADDRESS, 200, "10.0.0.4, 10.0.0.5");
    let error = Ec2::new(metadata.address).addresses().await.unwrap_err().to_string();
    assert!(error.contains("not an IPv4 address"), "{error}");
}

#[tokio::test]
async fn a_host_whose_metadata_service_gives_a_token_is_recognised() {
    let metadata = Service::start().await;
    Ec2::new(metadata.address).recognise().await.unwrap();
}

#[tokio::test]
async fn a_host_without_a_metadata_service_is_not_recognised_quickly() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let started = std::time::Instant::now();
    let error = Ec2::new(silent.local_addr().unwrap()).recognise().await.unwrap_err();
    assert!(matches!(error, AwsError::TooSlow { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
    let address = silent.local_addr().unwrap();
    drop(silent);
    let error = Ec2::new(address).recognise().await.unwrap_err();
    assert!(matches!(error, AwsError::Unreachable { .. }), "{error}");
}
