{{- define "onboarding.name" -}}
onboarding-operator
{{- end }}

{{- /* Where the ControlPlane, istiod and all that the operator makes are: agents know istiod by this name. */ -}}
{{- define "onboarding.namespace" -}}
istio-system
{{- end }}

{{- define "onboarding.clusterName" -}}
onboarding-operator-{{ include "onboarding.namespace" . }}
{{- end }}

{{- define "onboarding.selector" -}}
app.kubernetes.io/name: onboarding-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "onboarding.labels" -}}
{{ include "onboarding.selector" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: workload-onboarding
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Not `kubeVersion` of Chart.yaml: an API server that was built without its version (0.0.0) can't be judged, and isn't refused. */ -}}
{{- define "onboarding.validate" -}}
{{- $version := .Capabilities.KubeVersion.Version }}
{{- if not (hasPrefix "v0.0.0-" $version) }}
{{- if semverCompare "<1.31.0-0" $version }}
{{- fail (printf "Kubernetes 1.31 or later is needed, for the rules in the CustomResourceDefinitions; this is %s" $version) }}
{{- end }}
{{- end }}
{{- if gt (int .Values.replicas.min) (int .Values.replicas.max) }}
{{- fail (printf "replicas.min (%d) is more than replicas.max (%d)" (int .Values.replicas.min) (int .Values.replicas.max)) }}
{{- end }}
{{- if and .Values.packages.claim .Values.packages.image }}
{{- fail "packages.claim and packages.image: only one of them may be set" }}
{{- end }}
{{- if not (has .Values.images.pullPolicy (list "Always" "IfNotPresent" "Never")) }}
{{- fail (printf "images.pullPolicy is %q, and must be Always, IfNotPresent or Never" .Values.images.pullPolicy) }}
{{- end }}
{{- end }}
