//! The demo's manifests are those of the requirement, line for line, where it gives them whole.

/// As the requirement's page has them; its indentation is lost there.
const REQUIRED: &[(&str, &str)] = &[
    (
        "WorkloadGroup ratings",
        "apiVersion: networking.istio.io/v1alpha3
kind: WorkloadGroup
metadata:
name: ratings
namespace: bookinfo
labels:
app: ratings
spec:
template: # (1)
labels:
app: ratings
class: vm
serviceAccount: ratings-vm # (2)
network: virtual-machines # (3)",
    ),
    (
        "OnboardingPolicy allow-narrow-subset-of-aws-ec2-instances",
        "apiVersion: authorization.onboarding.tetrate.io/v1alpha1
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
- ratings-role # any AWS EC2 instance from the above partitions/accounts/regions/zones
# that is associated with one of IAM Roles on that list
onboardTo:
- workloadGroupSelector:
matchLabels:
app: ratings # (1)",
    ),
    (
        "Sidecar bookinfo-ratings-no-iptables",
        "apiVersion: networking.istio.io/v1beta1
kind: Sidecar
metadata:
name: bookinfo-ratings-no-iptables
namespace: bookinfo
spec:
workloadSelector: # (1)
labels:
app: ratings
class: vm
ingress: # (2)
- defaultEndpoint: 127.0.0.1:8080
port:
name: http
number: 8080
protocol: HTTP
egress: # (3)
- bind: 127.0.0.2
port:
number: 8080
hosts:
- ./*",
    ),
];

#[test]
fn the_demo_uses_the_manifests_of_the_requirement() {
    let file = include_str!("../../demo/manifests/ratings.yaml");
    let documents: Vec<String> = file
        .split("---\n")
        .map(|document| {
            let lines = document.lines().skip_while(|line| line.starts_with('#'));
            lines.map(str::trim).collect::<Vec<_>>().join("\n")
        })
        .collect();
    for (what, required) in REQUIRED {
        assert!(documents.iter().any(|document| document == required), "{what} isn't the requirement's");
    }
}
