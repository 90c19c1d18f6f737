package runtime_test

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestContainerLifeCycle(t *testing.T) {
	h := newHost(t)
	p := h.pod()
	id := p.run("echo hello; hostname; cat /etc/resolv.conf; exit 3")
	st := h.ended(id)
	if st.ExitCode != 3 || st.Reason != "Error" || st.StartedAt == 0 || st.FinishedAt < st.StartedAt {
		t.Errorf("status %v", st)
	}
	if got := h.logOf(id); got != "hello\nweb\nsearch svc.cluster.local\nnameserver 10.43.0.10\noptions ndots:5\n" {
		t.Errorf("log %q", got)
	}
	id = p.run("exec sleep 1000")
	if got := h.exec(id, "sh", "-c", "id -u; echo $HOSTNAME $FROM_IMAGE"); got != "0\nweb yes" {
		t.Errorf("exec says %q", got)
	}
	if st := h.status(id); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING || !strings.HasPrefix(st.ImageId, "sha256:abab") {
		t.Errorf("status %v", st)
	}
	if err := h.StopContainer(h.ctx, id, 0); err != nil {
		t.Fatal(err)
	}
	if st := h.status(id); st.ExitCode != 137 || st.Reason != "Error" {
		t.Errorf("status after kill %v", st)
	}
}
