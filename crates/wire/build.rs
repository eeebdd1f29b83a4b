//! Generates the messages and services of `proto/`, with no `protoc` installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::path::PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors =
        protox::compile(["onboarding/v1alpha1/onboarding.proto", "envoy/sds.proto", "istio/ca.proto"], [&root])?;
    tonic_prost_build::configure()
        .codec_path("crate::codec::SmallBuffers")
        .bytes(".onboarding.v1alpha1.XdsResource")
        .bytes(".onboarding.v1alpha1.Splice")
        .bytes(".onboarding.v1alpha1.Part")
        .compile_fds(descriptors)?;
    Ok(())
}
