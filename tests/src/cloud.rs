//! The clouds of a world: AWS as far as a VM and a plane see it, the issuer of a company, and somebody outside the mesh.

use crate::world::{ACCOUNT, Ca, REGION, World, binary};
use anyhow::Context;
use onboarding_testkit::cms::RegionKey;
use onboarding_testkit::netns::Machine;
use onboarding_testkit::process::Process;
use onboarding_testkit::sts::Cloud;
use onboarding_testkit::{ecs, imds, oidc};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// In `demo/manifests/controlplane.yaml`.
const ISSUER: &str = "https://mycompany.corp";
const ISSUER_HOST: &str = "mycompany.corp";

/// What the clouds' servers share.
pub(crate) struct Clouds {
    aws: Cloud,
    region: RegionKey,
}

impl Clouds {
    /// `pinned`: where the plane finds the certificate of our region.
    pub(crate) fn new(pinned: &Path) -> anyhow::Result<Self> {
        let region = RegionKey::generate(REGION)?;
        std::fs::write(pinned, region.pinned())?;
        Ok(Self { aws: Cloud::generate()?, region })
    }
}

impl World {
    /// STS, the issuer, and `example.org`.
    pub(crate) fn start_services(&self, ca: &Ca) -> anyhow::Result<Vec<Process>> {
        let (certificate_chain, private_key) = ca.issue(&[ISSUER_HOST])?;
        let issuer = oidc::Config { issuer: ISSUER.to_owned(), certificate_chain, private_key };
        self.plane_machine.add_host(self.cloud.address(), ISSUER_HOST)?;
        Ok(vec![
            server(&self.cloud, "sts", &["--listen", "0.0.0.0:8081"], Some(serde_json::to_string(&self.clouds.aws)?))?,
            server(&self.cloud, "oidc", &[], Some(serde_json::to_string(&issuer)?))?,
            server(&self.external, "application", &["--name", "example.org", "--listen", "0.0.0.0:8080"], None)?,
        ])
    }

    /// The metadata service of an instance, at the real address, in this machine alone.
    pub(crate) fn metadata_server(
        &self,
        machine: &Machine,
        instance: &str,
        zone: &str,
        role: &str,
    ) -> anyhow::Result<Process> {
        let instance = imds::Instance {
            account: ACCOUNT.to_owned(),
            region: REGION.to_owned(),
            zone: zone.to_owned(),
            instance_id: instance.to_owned(),
            role: Some(role.to_owned()),
            private_ip: machine.address().to_string(),
        };
        let config = imds::Config::new(&instance, &self.clouds.region, &self.clouds.aws)?;
        server(machine, "imds", &[], Some(serde_json::to_string(&config)?))
    }

    /// What ECS puts beside a task, at the real address, in this machine alone.
    pub(crate) fn task_server(
        &self,
        machine: &Machine,
        task: &str,
        cluster: &str,
        role: &str,
    ) -> anyhow::Result<Process> {
        let task = ecs::Task {
            account: ACCOUNT.to_owned(),
            region: REGION.to_owned(),
            zone: format!("{REGION}b"),
            cluster: cluster.to_owned(),
            task_id: task.to_owned(),
            role: Some(role.to_owned()),
            address: machine.address().into(),
        };
        let config = ecs::Config::new(&task, &self.clouds.aws)?;
        server(machine, "ecs", &[], Some(serde_json::to_string(&config)?))
    }

    /// A credential plugin as people write them: a shell script that fetches a token of the company's issuer for the audience
    /// which it is asked for.
    pub(crate) fn credential_plugin(
        &self,
        machine: &Machine,
        subject: &str,
        region: &str,
        role: &str,
    ) -> anyhow::Result<PathBuf> {
        let path = machine.directory().join("my-jwt-plugin.sh");
        std::fs::write(&path, self.credential_plugin_script(Some(&self.ca_file()), subject, region, role))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// Its text. `ca`: of the issuer's certificate; the system's trust store where there is none.
    pub(crate) fn credential_plugin_script(
        &self,
        ca: Option<&Path>,
        subject: &str,
        region: &str,
        role: &str,
    ) -> String {
        format!(
            r#"#!/bin/sh
# GetCredential: reads {{"audience": "<plane UID>"}}, answers with a credential.
set -eu
audience=$(sed -E 's/.*"audience" *: *"([^"]*)".*/\1/')
now=$(date +%s)
token=$(curl -sSf -m 5 {ca} "{ISSUER}/token?alg=ES256" -H 'content-type: application/json' -d '{{
    "sub": "{subject}", "aud": "'"$audience"'", "iat": '"$now"', "exp": '"$((now + 3600))"',
    "custom_attributes": {{"region": "{region}", "instance_role": "{role}"}}
}}')
printf '{{"credential": {{"@type": "type.googleapis.com/example.JwtCredential", "token": "%s"}}, "expiresAt": "%s"}}\n' \
    "$token" "$(date -u -d "@$((now + 3600))" +%Y-%m-%dT%H:%M:%SZ)"
"#,
            ca = ca.map(|ca| format!("--cacert {}", ca.display())).unwrap_or_default(),
        )
    }
}

/// One of the servers of `onboarding-testkit`, once it listens.
fn server(machine: &Machine, verb: &str, arguments: &[&str], config: Option<String>) -> anyhow::Result<Process> {
    let mut command = machine.command(binary("onboarding-testkit")?);
    command.arg(verb).args(arguments);
    if let Some(config) = config {
        let file = machine.directory().join(format!("{verb}.json"));
        std::fs::write(&file, config).with_context(|| format!("writing {}", file.display()))?;
        command.arg("--config").arg(file);
    }
    let server = Process::start(&format!("{}: {verb}", machine.name()), command, None)?;
    server.wait_for_line(Duration::from_secs(10), |line| line.starts_with("listening on"))?;
    Ok(server)
}
