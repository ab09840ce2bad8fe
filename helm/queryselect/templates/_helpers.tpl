{{/* The name of all that there is one of. With more characters, pods would have other names than NAME-HASH-RANDOM, by
     which KEDA's query finds them. */}}
{{- define "queryselect.fullname" -}}
{{- $made := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) -}}
{{- .Values.fullnameOverride | default $made | trunc 46 | trimSuffix "-" -}}
{{- end }}

{{- define "queryselect.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "queryselect.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "queryselect.labels" -}}
{{ include "queryselect.selectorLabels" . }}
{{ include "queryselect.commonLabels" . }}
{{- end }}

{{/* Name, namespace and labels. Its argument: the root and a suffix of the name. */}}
{{- define "queryselect.metadata" -}}
{{- $root := first . -}}
name: {{ printf "%s%s" (include "queryselect.fullname" $root) (last .) | quote }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "queryselect.labels" $root | nindent 2 }}
{{- end }}

{{/* How many pods there are; empty where something else than the Deployment says so. */}}
{{- define "queryselect.replicas" -}}
{{- if and (eq .Values.autoscaling.by "none") (not (kindIs "invalid" .Values.replicas)) -}}
{{ int .Values.replicas }}
{{- end }}
{{- end }}

{{- define "queryselect.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ .suffix }}{{ end }}
{{- end }}
{{- end }}

{{/* For gateways and meshes, which must not take TLS for plain HTTP/2. */}}
{{- define "queryselect.appProtocol" -}}
{{ empty .Values.tls.existingSecret | ternary "kubernetes.io/h2c" "https" }}
{{- end }}

{{- define "queryselect.serviceAccountName" -}}
{{- with .Values.serviceAccount -}}
{{ .name | default (.create | ternary (include "queryselect.fullname" $) "default") }}
{{- end }}
{{- end }}

{{/* The settings as TOML: what values say, and what the chart makes of other values. JSON's strings, numbers and truths
     are TOML's too. */}}
{{- define "queryselect.settings" -}}
{{- $settings := omit .Values.settings "host" }}
{{- $device := gt (int .Values.gpu.count) 0 | ternary "cuda" "cpu" }}
{{- $made := dict "port" 50051 "metrics_port" 9090 "health_port" 50052 }}
{{- if .Values.tls.existingSecret }}
{{- $_ := set $made "tls_cert" "/etc/queryselect/tls/tls.crt" }}
{{- $_ := set $made "tls_key" "/etc/queryselect/tls/tls.key" }}
{{- end }}
{{- if .Values.tls.clientCASecret }}
{{- $_ := set $made "tls_client_ca" "/etc/queryselect/client-ca/ca.crt" }}
{{- end }}
{{- if .Values.auth.existingSecret }}
{{- $_ := set $made "token_file" "/etc/queryselect/tokens/tokens.toml" }}
{{- end }}
{{- range $name, $value := merge $made $settings (dict "device" $device) }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end }}

{{/* What can't work is refused before anything is installed. */}}
{{- define "queryselect.check" -}}
{{- $name := include "queryselect.fullname" . }}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) }}
{{- fail (printf "no Service can be called %s: set fullnameOverride to small letters, digits and hyphens, of which the first is a letter" $name) }}
{{- end }}
{{- $ports := "the pod's ports are fixed; service.port is the Service's" }}
{{- $tls := "set tls.existingSecret and tls.clientCASecret" }}
{{- $made := dict "port" $ports "metrics_port" $ports "health_port" $ports "tls_cert" $tls "tls_key" $tls }}
{{- $made = merge $made (dict "tls_client_ca" $tls "token_file" "set auth.existingSecret") }}
{{- range $name, $instead := $made }}
{{- if hasKey $.Values.settings $name }}
{{- fail (printf "settings.%s is not for you to set: %s" $name $instead) }}
{{- end }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if hasPrefix "QUERYSELECT_" .name }}
{{- fail (printf "extraEnv has %s: use settings.%s" .name (.name | trimPrefix "QUERYSELECT_" | lower)) }}
{{- end }}
{{- end }}
{{- range $name, $_ := merge dict (.Values.resources.limits | default dict) (.Values.resources.requests | default dict) }}
{{- if or (eq $name $.Values.gpu.resource) (hasPrefix "nvidia.com/" $name) }}
{{- fail (printf "resources has %s: set gpu.count and gpu.resource, by which the server knows its device" $name) }}
{{- end }}
{{- end }}
{{- with .Values.autoscaling }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas is %d, and autoscaling.maxReplicas %d" (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- end }}
{{- if and .Values.tls.clientCASecret (not .Values.tls.existingSecret) }}
{{- fail "tls.clientCASecret needs tls.existingSecret: clients show certificates within TLS" }}
{{- end }}
{{- if and .Values.auth.existingSecret (not .Values.tls.existingSecret) (not .Values.settings.allow_plaintext_tokens) }}
{{- fail "auth.existingSecret without tls.existingSecret: tokens would travel in clear text. Set tls.existingSecret, or settings.allow_plaintext_tokens where a proxy or mesh in front of the pods ends TLS" }}
{{- end }}
{{- end }}

{{/* Of the pod of `helm test`: other than the server's, or Services would send it requests. */}}
{{- define "queryselect.testLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-test
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}
