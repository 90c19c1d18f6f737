package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestRank(t *testing.T) {
	pod := func(name, request string, priority int32) *v1.Pod {
		p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1.PodSpec{Priority: &priority, Containers: []v1.Container{{}}}}
		if request != "" {
			p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceMemory: resource.MustParse(request)}
		}
		return p
	}
	within, over, important, besteffort := pod("within", "100Mi", 0), pod("over", "10Mi", 0), pod("important", "10Mi", 10), pod("besteffort", "", 0)
	used := map[*v1.Pod]int64{within: 50 << 20, over: 50 << 20, important: 90 << 20, besteffort: 80 << 20}
	pods := []*v1.Pod{within, important, over, besteffort}
	rank(pods, used, v1.ResourceMemory)
	var names []string
	for _, p := range pods {
		names = append(names, p.Name)
	}
	require.Equal(t, []string{"besteffort", "over", "important", "within"}, names)
}

func TestOptionsNameEverythingWrong(t *testing.T) {
	_, err := New(Options{NodeName: "No!", RootDir: "relative", CgroupRoot: "/", MaxPods: -1})
	require.Error(t, err)
	for _, want := range []string{`NodeName "No!"`, `RootDir "relative"`, "NodeIPs", "Client and Informers", "Runtime and Images", `CgroupRoot "/"`, "MaxPods -1"} {
		require.ErrorContains(t, err, want)
	}
}

func TestHugePages(t *testing.T) {
	dir := t.TempDir()
	for name, n := range map[string]string{"hugepages-2048kB": "3\n", "hugepages-1048576kB": "0\n", "hugepages-64kB": "1\n"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, name), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, name, "nr_hugepages"), []byte(n), 0o644))
	}
	require.Equal(t, map[string]uint64{"2Mi": 6 << 20, "1Gi": 0, "64Ki": 64 << 10}, hugePages(dir))
}
