package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"knarr/node/agent"
)

const manifest = `
apiVersion: v1
kind: Pod
metadata: {name: fixed}
spec:
  terminationGracePeriodSeconds: 1
  enableServiceLinks: false
  containers: [{name: main, image: "test.local/busybox:1", command: [sleep, "1000"]}]
`

func TestStaticPod(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "fixed.yaml")
	require.NoError(t, os.WriteFile(file, []byte(manifest), 0o600))
	n := newNode(t, func(o *agent.Options) { o.StaticPodDir = dir })
	p := n.until("fixed-"+nodeName, "running", running)
	require.Equal(t, "Node", p.OwnerReferences[0].Kind)
	require.Equal(t, "file", p.Annotations["kubernetes.io/config.source"])
	pid := n.pid("fixed-"+nodeName, "main")

	zero := int64(0)
	require.NoError(t, n.client.CoreV1().Pods(namespace).Delete(context.Background(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero}))
	n.until(p.Name, "mirrored again", running)
	require.Equal(t, pid, n.pid(p.Name, "main"), "deleting the mirror does not touch the pod")

	n.stop()
	n.start()
	require.NoError(t, os.WriteFile(file, []byte(strings.ReplaceAll(manifest, "1000", "2000")), 0o600))
	old := p.Annotations["kubernetes.io/config.hash"]
	n.until(p.Name, "replaced", func(p *v1.Pod) bool {
		return running(p) && p.Annotations["kubernetes.io/config.hash"] != old
	})
	require.NoError(t, os.Remove(file))
	n.until(p.Name, "gone", gone)
	require.Eventually(t, func() bool { return len(n.containersOf(p.Name)) == 0 }, wait, 20_000_000)
}
