//! What travels between agent and plane: the generated messages, the bytes that a key signs, and conversions to core.
//!
//! No policy, no verification of evidence, no sockets.

pub mod codec;
pub mod convert;
pub mod parts;
pub mod proof;
pub mod xds;

/// Agent and endpoint. The source is `proto/onboarding/v1alpha1/onboarding.proto`.
#[allow(missing_docs, clippy::all)]
pub mod onboarding {
    tonic::include_proto!("onboarding.v1alpha1");
}

/// The part of Envoy's SDS that the agent serves.
#[allow(missing_docs, clippy::all)]
pub mod sds {
    tonic::include_proto!("envoy.service.secret.v3");
}

/// The certificate authority of an Istio mesh. The source is `proto/istio/ca.proto`.
#[allow(missing_docs, clippy::all)]
pub mod istio_ca {
    tonic::include_proto!("istio.v1.auth");
}

/// The credential's type in `google.protobuf.Any`.
pub const AWS_EC2_CREDENTIAL: &str = "type.googleapis.com/onboarding.v1alpha1.AwsEc2Credential";
pub const AWS_ECS_CREDENTIAL: &str = "type.googleapis.com/onboarding.v1alpha1.AwsEcsCredential";
pub const JWT_CREDENTIAL: &str = "type.googleapis.com/onboarding.v1alpha1.JwtCredential";

/// In the metadata of a ResourceExhausted answer: how many milliseconds to wait at least (gRFC A6).
pub const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";
