package several

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
)

const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  users: ["system:admin"]
  resources: [{resources: [secrets]}]
- level: RequestResponse
  users: ["system:admin"]
  resources: [{resources: [configmaps]}]
- level: None
`

// TestAuditLog: a server writes what the policy wants, and no more, into a file that only its user reads.
func TestAuditLog(t *testing.T) {
	dir := t.TempDir()
	policy, log := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "logs", "audit.log")
	require.NoError(t, os.WriteFile(policy, []byte(auditPolicy), 0o600))
	s := newServer(t, nil, 0, "--audit-policy-file", policy, "--audit-log-path", log)
	s.start(t)
	ctx := t.Context()
	_, err := s.CoreV1().Secrets("default").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"k": "hidden"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = s.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Data: map[string]string{"k": "shown"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = s.CoreV1().ConfigMaps("default").Get(ctx, "nosuch", metav1.GetOptions{})
	require.Error(t, err)
	_, err = s.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
	require.NoError(t, err)

	var events []auditv1.Event
	eventually(t, "the events are in the file", func() (bool, string) {
		raw, err := os.ReadFile(log)
		events = nil
		for line := range bytes.Lines(raw) {
			var e auditv1.Event
			if err := json.Unmarshal(line, &e); err == nil { // the last line may be written just now
				events = append(events, e)
			}
		}
		return len(events) >= 3, fmt.Sprintf("%s %v", raw, err)
	})
	info, err := os.Stat(log)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o600), info.Mode())
	raw, err := os.ReadFile(log)
	require.NoError(t, err)
	require.NotContains(t, string(raw), "hidden")
	require.Len(t, events, 3, "%s", raw)
	for i, want := range []struct {
		verb, resource, name string
		level                auditv1.Level
		code                 int32
		holds                string
	}{
		{"create", "secrets", "s", auditv1.LevelMetadata, 201, ""},
		{"create", "configmaps", "m", auditv1.LevelRequestResponse, 201, "shown"},
		{"get", "configmaps", "nosuch", auditv1.LevelRequestResponse, 404, ""},
	} {
		e := events[i]
		require.Equal(t, want.verb+" "+want.resource+" "+want.name, e.Verb+" "+e.ObjectRef.Resource+" "+e.ObjectRef.Name)
		require.Equal(t, want.level, e.Level)
		require.Equal(t, auditv1.StageResponseComplete, e.Stage)
		require.Equal(t, "system:admin", e.User.Username)
		require.Equal(t, []string{addresses[0]}, e.SourceIPs)
		require.Equal(t, want.code, e.ResponseStatus.Code)
		require.Equal(t, "allow", e.Annotations["authorization.k8s.io/decision"])
		require.NotEmpty(t, e.AuditID)
		if want.holds == "" {
			require.Nil(t, e.RequestObject)
			continue
		}
		require.Contains(t, string(e.RequestObject.Raw), want.holds)
		require.Contains(t, string(e.ResponseObject.Raw), want.holds)
	}
}
