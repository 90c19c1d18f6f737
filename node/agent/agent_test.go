package agent_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
)

func TestPodRunsAndGoes(t *testing.T) {
	n := newNode(t, nil)
	begin := time.Now()
	n.create(pod("one", "sleep 1000"))
	p := n.until("one", "running", running)
	t.Logf("create to Running: %v", time.Since(begin))
	require.Equal(t, v1.PodQOSBestEffort, p.Status.QOSClass)
	require.NotEmpty(t, p.Status.PodIP)
	require.Equal(t, "127.0.0.1", p.Status.HostIP)
	require.NotNil(t, p.Status.StartTime)
	require.Equal(t, int64(1), p.Status.ObservedGeneration)
	c := p.Status.ContainerStatuses[0]
	require.True(t, c.Ready)
	require.True(t, *c.Started)
	n.remove("one", 1)
	n.until("one", "gone", gone)
}

// TestStartLatency prints how long a pod with a local image takes from its
// creation to Running.
func TestStartLatency(t *testing.T) {
	n := newNode(t, nil)
	n.create(pod("first", "sleep 1000"))
	n.until("first", "running", running)
	var all []time.Duration
	for i := range 10 {
		name := fmt.Sprintf("p%d", i)
		begin := time.Now()
		n.create(pod(name, "sleep 1000", withToken))
		n.until(name, "running", running)
		all = append(all, time.Since(begin))
	}
	slices.Sort(all)
	t.Logf("create to Running: median %v, max %v", all[len(all)/2], all[len(all)-1])
	require.Less(t, all[len(all)/2], time.Second)
}

// withToken gives the pod the volume that the ServiceAccount admission adds.
func withToken(p *v1.Pod) {
	mode, expire := int32(0o644), int64(3607)
	p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: "kube-api-access", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{
		DefaultMode: &mode, Sources: []v1.VolumeProjection{
			{ServiceAccountToken: &v1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: &expire}},
			{ConfigMap: &v1.ConfigMapProjection{LocalObjectReference: v1.LocalObjectReference{Name: "kube-root-ca.crt"},
				Items: []v1.KeyToPath{{Key: "ca.crt", Path: "ca.crt"}}}},
			{DownwardAPI: &v1.DownwardAPIProjection{Items: []v1.DownwardAPIVolumeFile{
				{Path: "namespace", FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.namespace"}}}}},
		}}}})
	p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts,
		v1.VolumeMount{Name: "kube-api-access", MountPath: "/var/run/secrets/kubernetes.io/serviceaccount", ReadOnly: true})
}
