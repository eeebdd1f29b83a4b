//! `GetCallerIdentity` requests as hosts sign them, by AWS's own library.

use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use onboarding_core::identity::Thumbprint;
use onboarding_testkit::sts::Credentials;
use onboarding_wire::onboarding::SignedCallerIdentity;
use onboarding_wire::proof::{STS_BINDING_HEADER, STS_BODY, STS_CONTENT_TYPE, sts_binding, sts_host};
use std::time::SystemTime;

pub fn signed(
    credentials: &Credentials,
    region: &str,
    uid: &str,
    challenge: &[u8],
    key: Thumbprint,
) -> SignedCallerIdentity {
    signed_at(credentials, region, uid, challenge, key, SystemTime::now())
}

pub fn signed_at(
    credentials: &Credentials,
    region: &str,
    uid: &str,
    challenge: &[u8],
    key: Thumbprint,
    at: SystemTime,
) -> SignedCallerIdentity {
    let identity = aws_credential_types::Credentials::new(
        &credentials.access_key_id,
        &credentials.secret_access_key,
        Some(credentials.session_token.clone()),
        None,
        "test",
    )
    .into();
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region(region)
        .name("sts")
        .time(at)
        .settings(SigningSettings::default())
        .build()
        .unwrap()
        .into();
    let binding = sts_binding(uid, challenge, key);
    let headers = [("content-type", STS_CONTENT_TYPE), (STS_BINDING_HEADER, binding.as_str())];
    let url = format!("https://{}/", sts_host(region));
    let body = SignableBody::Bytes(STS_BODY.as_bytes());
    let request = SignableRequest::new("POST", &url, headers.into_iter(), body).unwrap();
    let (instructions, signature) = sign(request, &parameters).unwrap().into_parts();
    let date = instructions.headers().find(|(name, _)| *name == "x-amz-date").unwrap().1.to_owned();
    SignedCallerIdentity {
        region: region.to_owned(),
        amz_date: date,
        access_key_id: credentials.access_key_id.clone(),
        session_token: credentials.session_token.clone(),
        signature,
    }
}
