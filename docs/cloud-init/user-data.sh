#!/bin/bash
# User data of an EC2 instance that joins the mesh at its first boot: any image with DEB or RPM packages, systemd and curl.
# Replace the endpoint's name, the group, and the CA (or leave that out where the system knows it).
set -euo pipefail
endpoint=onboarding-endpoint.your-company.corp

certificate=$(mktemp)
cat >"$certificate" <<'PEM'
-----BEGIN CERTIFICATE-----
REPLACE WITH THE CA'S CERTIFICATE
-----END CERTIFICATE-----
PEM
if command -v update-ca-certificates >/dev/null; then
    install -m 0644 "$certificate" /usr/local/share/ca-certificates/your-company.crt
    update-ca-certificates
else
    install -m 0644 "$certificate" /etc/pki/ca-trust/source/anchors/your-company.pem
    update-ca-trust
fi
rm "$certificate"

case $(uname -m) in
    x86_64) arch=amd64 ;;
    aarch64) arch=arm64 ;;
esac
if command -v apt-get >/dev/null; then
    # At first boot unattended-upgrades may hold dpkg's lock for minutes.
    format=deb install=(apt-get -o DPkg::Lock::Timeout=600 install -y)
else
    format=rpm install=("$(command -v dnf || command -v yum)" install -y)
fi
work=$(mktemp -d)
cd "$work"
for package in istio-sidecar onboarding-agent; do
    curl -fLO --retry 10 "https://$endpoint/install/$format/$arch/$package.$format"
    curl -fLO --retry 10 "https://$endpoint/install/$format/$arch/$package.$format.sha256"
    sha256sum --check "$package.$format.sha256"
    "${install[@]}" "./$package.$format"
done
cd /
rm -r "$work"

cat >/etc/onboarding-agent/onboarding.config.yaml <<YAML
apiVersion: config.agent.onboarding.tetrate.io/v1alpha1
kind: OnboardingConfiguration
onboardingEndpoint:
  host: $endpoint
workloadGroup:
  namespace: bookinfo
  name: ratings
YAML
systemctl enable --now onboarding-agent
