//! Runs the real binary on files of a directory of its own.
#![allow(dead_code, reason = "each test file uses its part")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub struct Dir(tempfile::TempDir);

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// With these files, in directories that are made for them.
    pub fn with(files: &[(&str, &str)]) -> Self {
        let dir = Self::new();
        files.iter().for_each(|(name, text)| dir.write(name, text));
        dir
    }

    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `onboardctl` in this directory, with nothing of the environment that it reads.
    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.run_with(arguments, "", &[])
    }

    pub fn run_with(&self, arguments: &[&str], stdin: &str, environment: &[(&str, &Path)]) -> Ended {
        self.run_as(Path::new(env!("CARGO_BIN_EXE_onboardctl")), arguments, stdin, environment)
    }

    /// The binary by another name, such as that of kubectl's plugin.
    pub fn run_as(&self, program: &Path, arguments: &[&str], stdin: &str, environment: &[(&str, &Path)]) -> Ended {
        let mut child = Command::new(program)
            .args(arguments)
            .current_dir(self.0.path())
            .env_remove("ONBOARDING_ADMIN_SOCKET")
            .env_remove("ONBOARDING_DATA_DIR")
            .env_remove("KUBECONFIG")
            .env_remove("KUBERNETES_SERVICE_HOST")
            .env("HOME", self.0.path())
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may end without having read it.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let output = child.wait_with_output().unwrap();
        Ended {
            code: output.status.code().expect("it ends by itself"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ended {
    #[track_caller]
    pub fn is(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    #[track_caller]
    pub fn says(self, part: &str) -> Self {
        assert!(self.stdout.contains(part), "{part:?} isn't on standard output: {self:?}");
        self
    }

    #[track_caller]
    pub fn complains(self, part: &str) -> Self {
        assert!(self.stderr.contains(part), "{part:?} isn't on standard error: {self:?}");
        self
    }

    /// Nothing is on standard output.
    #[track_caller]
    pub fn silent(self) -> Self {
        assert_eq!(self.stdout, "", "{self:?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// The restrictive policy of the requirement.
pub const NARROW: &str = "\
apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata:
  name: allow-narrow-subset-of-aws-ec2-instances
  namespace: bookinfo
spec:
  allow:
  - workloads:
    - aws:
        partitions:
        - aws
        accounts:
        - '123456789012'
        regions:
        - us-east-2
        zones:
        - us-east-2b
        ec2:
          iamRoleNames:
          - ratings-role
    onboardTo:
    - workloadGroupSelector:
        matchLabels:
          app: ratings
";

pub const GROUP: &str = "\
apiVersion: networking.istio.io/v1alpha3
kind: WorkloadGroup
metadata:
  name: ratings
  namespace: bookinfo
  labels:
    app: ratings
spec:
  template:
    labels:
      app: ratings
      class: vm
    serviceAccount: ratings-vm
    network: virtual-machines
";

/// With a place for what is below `onboarding`.
pub fn control_plane(uid: &str, issuers: &str) -> String {
    format!(
        "\
apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata:
  name: controlplane
  namespace: istio-system
spec:
  meshExpansion:
    onboarding:
      endpoint:
        hosts: [onboarding-endpoint.your-company.corp]
        secretName: onboarding-endpoint-tls
{uid}      workloads:
        authentication:
          jwt:
            issuers: {issuers}
"
    )
}
