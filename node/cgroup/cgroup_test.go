package cgroup

import (
	"crypto/rand"
	"encoding/hex"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
)

func TestPodCgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups need root")
	}
	suffix := make([]byte, 4)
	_, _ = rand.Read(suffix)
	m, err := New("/knarr-cgroup-test-" + hex.EncodeToString(suffix))
	require.NoError(t, err)
	defer func() { require.NoError(t, m.RemoveRoot()) }()
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "0-1"}, Spec: v1.PodSpec{Containers: []v1.Container{{
		Resources: v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceMemory: resource.MustParse("32Mi"), v1.ResourceCPU: resource.MustParse("500m")}}}}}}
	log := klog.Background()
	require.False(t, m.Exists(pod))
	require.NoError(t, m.EnsureExists(log, pod))
	require.NoError(t, m.EnsureExists(log, pod), "twice is once")
	require.True(t, m.Exists(pod))
	_, path := m.GetPodContainerName(pod)
	require.Equal(t, m.rootPath+"/pod0-1", path)
	is, uid := m.IsPodCgroup(path)
	require.True(t, is)
	require.Equal(t, types.UID("0-1"), uid)
	rc, err := m.GetPodCgroupConfig(pod, v1.ResourceMemory)
	require.NoError(t, err)
	require.Equal(t, int64(32<<20), *rc.Memory)
	rc, err = m.GetPodCgroupConfig(pod, v1.ResourceCPU)
	require.NoError(t, err)
	require.Equal(t, int64(50_000), *rc.CPUQuota)
	all, err := m.GetAllPodsFromCgroups()
	require.NoError(t, err)
	require.Len(t, all, 1)
	require.NoError(t, m.DestroyPod("0-1"))
	require.False(t, m.Exists(pod))
	require.NoError(t, m.DestroyPod("0-1"), "gone already")
}
