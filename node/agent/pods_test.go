package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// exec runs a command in the running container of a pod.
func (n *node) exec(podName, container string, cmd ...string) string {
	n.t.Helper()
	out, stderr, err := n.rt.ExecSync(context.Background(), n.containerID(podName, container), cmd, 10*time.Second)
	require.NoError(n.t, err, "%s%s", out, stderr)
	return strings.TrimSpace(string(out))
}

func (n *node) containerID(podName, container string) string {
	n.t.Helper()
	for _, c := range n.containersOf(podName) {
		if c.Metadata.Name == container && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			return c.Id
		}
	}
	n.t.Fatalf("no running container %s in pod %s", container, podName)
	return ""
}

func (n *node) containersOf(podName string) []*runtimeapi.Container {
	n.t.Helper()
	list, err := n.rt.ListContainers(context.Background(), &runtimeapi.ContainerFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.name": podName}})
	require.NoError(n.t, err)
	return list
}

func status(p *v1.Pod, name string) v1.ContainerStatus {
	for _, list := range [][]v1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, c := range list {
			if c.Name == name {
				return c
			}
		}
	}
	return v1.ContainerStatus{}
}

func condition(p *v1.Pod, t v1.PodConditionType) v1.ConditionStatus {
	for _, c := range p.Status.Conditions {
		if c.Type == t {
			return c.Status
		}
	}
	return ""
}

func waitingFor(name, reason string) func(*v1.Pod) bool {
	return func(p *v1.Pod) bool {
		if p == nil {
			return false
		}
		w := status(p, name).State.Waiting
		return w != nil && w.Reason == reason
	}
}

func phase(want v1.PodPhase) func(*v1.Pod) bool {
	return func(p *v1.Pod) bool { return p != nil && p.Status.Phase == want }
}

func TestPodLife(t *testing.T) {
	n := newNode(t, nil)
	for name, test := range map[string]func(*testing.T, *node){
		"finished": testFinished, "message": testMessage, "crash": testCrash, "init": testInit, "sidecar": testSidecar,
		"probes": testProbes, "image": testImage, "missing": testMissingConfig, "update": testConfigUpdate, "hooks": testHooks,
		"force": testForceDelete, "ephemeral": testEphemeral, "deadline": testDeadline, "admission": testAdmission,
		"environment": testEnvironment, "volumes": testVolumes, "resize": testResize, "hostnetwork": testHostNetwork,
		"storage": testStorageLimit,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sub := *n
			sub.t = t
			test(t, &sub)
		})
	}
}

func never(p *v1.Pod) { p.Spec.RestartPolicy = v1.RestartPolicyNever }

func testFinished(t *testing.T, n *node) {
	n.create(pod("good", "exit 0", never))
	p := n.until("good", "succeeded", phase(v1.PodSucceeded))
	require.Equal(t, "Completed", status(p, "main").State.Terminated.Reason)
	require.Equal(t, v1.ConditionFalse, condition(p, v1.PodReady))
	require.Equal(t, v1.ConditionTrue, condition(p, v1.PodInitialized))
	n.create(pod("bad", "exit 3", never))
	p = n.until("bad", "failed", phase(v1.PodFailed))
	require.Equal(t, int32(3), status(p, "main").State.Terminated.ExitCode)
	require.Equal(t, "Error", status(p, "main").State.Terminated.Reason)
	n.remove("good", 0)
	n.until("good", "gone", gone)
	require.Eventually(t, func() bool { return len(n.containersOf("good")) == 0 }, wait, 20*time.Millisecond)
}

func testMessage(t *testing.T, n *node) {
	n.create(pod("message", "echo -n told > /dev/termination-log", never))
	p := n.until("message", "succeeded", phase(v1.PodSucceeded))
	require.Equal(t, "told", status(p, "main").State.Terminated.Message)
	n.create(pod("fallback", "echo from the log; exit 1", never, func(p *v1.Pod) {
		p.Spec.Containers[0].TerminationMessagePolicy = v1.TerminationMessageFallbackToLogsOnError
	}))
	p = n.until("fallback", "failed", phase(v1.PodFailed))
	require.Equal(t, "from the log\n", status(p, "main").State.Terminated.Message)
}

func testCrash(t *testing.T, n *node) {
	n.create(pod("crash", "sleep 0.2; exit 7"))
	p := n.until("crash", "backing off", waitingFor("main", "CrashLoopBackOff"))
	s := status(p, "main")
	require.Contains(t, s.State.Waiting.Message, "back-off 10s restarting failed container=main pod=crash_default(")
	require.GreaterOrEqual(t, s.RestartCount, int32(1))
	require.Equal(t, int32(7), s.LastTerminationState.Terminated.ExitCode)
	require.Equal(t, v1.PodRunning, p.Status.Phase)
	begin := time.Now()
	again := n.until("crash", "restarted", func(p *v1.Pod) bool { return status(p, "main").RestartCount > s.RestartCount })
	t.Logf("restarted after %v, restartCount %d", time.Since(begin), status(again, "main").RestartCount)
	require.Greater(t, time.Since(begin), 7*time.Second)
	require.LessOrEqual(t, len(n.containersOf("crash")), 3)
}

func testInit(t *testing.T, n *node) {
	n.create(pod("init", "cat /work/said; sleep 1000", func(p *v1.Pod) {
		work := v1.VolumeMount{Name: "work", MountPath: "/work"}
		p.Spec.Volumes = []v1.Volume{{Name: "work", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}}}
		first, second := container("first", "sleep 0.3; echo one > /work/said"), container("second", "echo two >> /work/said")
		first.VolumeMounts, second.VolumeMounts = []v1.VolumeMount{work}, []v1.VolumeMount{work}
		p.Spec.InitContainers = []v1.Container{first, second}
		p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{work}
	}))
	p := n.until("init", "initializing", func(p *v1.Pod) bool { return status(p, "first").State.Running != nil })
	require.Equal(t, v1.PodPending, p.Status.Phase)
	require.Equal(t, v1.ConditionFalse, condition(p, v1.PodInitialized))
	require.Equal(t, "PodInitializing", status(p, "main").State.Waiting.Reason)
	p = n.until("init", "running", running)
	require.Equal(t, "one\ntwo", n.exec("init", "main", "cat", "/work/said"))
	require.Equal(t, "Completed", status(p, "first").State.Terminated.Reason)
	require.True(t, status(p, "second").Ready)
}

func testSidecar(t *testing.T, n *node) {
	n.create(pod("sidecar", "sleep 0.5", never, func(p *v1.Pod) {
		always := v1.ContainerRestartPolicyAlways
		side := container("side", "sleep 1000")
		side.RestartPolicy = &always
		side.StartupProbe = &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{"true"}}},
			TimeoutSeconds: 5, PeriodSeconds: 1, SuccessThreshold: 1, FailureThreshold: 3}
		p.Spec.InitContainers = []v1.Container{side}
	}))
	p := n.until("sidecar", "running", running)
	require.True(t, *status(p, "side").Started)
	p = n.until("sidecar", "succeeded", phase(v1.PodSucceeded))
	require.NotNil(t, status(p, "side").State.Terminated, "the sidecar is stopped after the app")
}

func testProbes(t *testing.T, n *node) {
	exec := func(cmd ...string) *v1.Probe {
		return &v1.Probe{ProbeHandler: v1.ProbeHandler{Exec: &v1.ExecAction{Command: cmd}}, TimeoutSeconds: 5, PeriodSeconds: 1, SuccessThreshold: 1, FailureThreshold: 1}
	}
	n.create(pod("probed", "sleep 0.4; touch /tmp/up; sleep 1000", func(p *v1.Pod) {
		c := &p.Spec.Containers[0]
		c.StartupProbe = exec("test", "-e", "/tmp/up")
		c.StartupProbe.FailureThreshold = 30
		c.ReadinessProbe = exec("test", "!", "-e", "/tmp/busy")
		c.LivenessProbe = exec("test", "!", "-e", "/tmp/dead")
	}))
	p := n.until("probed", "started but for its startup probe", func(p *v1.Pod) bool { return status(p, "main").State.Running != nil })
	require.False(t, *status(p, "main").Started)
	require.False(t, status(p, "main").Ready)
	begin := time.Now()
	p = n.until("probed", "ready", running)
	t.Logf("ready after %v", time.Since(begin))
	require.True(t, *status(p, "main").Started)
	n.exec("probed", "main", "touch", "/tmp/busy")
	p = n.until("probed", "unready", func(p *v1.Pod) bool { return !ready(p) })
	require.Equal(t, v1.PodRunning, p.Status.Phase)
	n.exec("probed", "main", "touch", "/tmp/dead")
	p = n.until("probed", "restarted", func(p *v1.Pod) bool { return status(p, "main").RestartCount == 1 })
	events := n.recorded()
	require.Contains(t, events, "Warning Unhealthy Liveness probe failed")
	require.Contains(t, events, "Normal Killing Container main failed liveness probe, will be restarted")
	require.NotNil(t, status(p, "main").LastTerminationState.Terminated)
}

func testImage(t *testing.T, n *node) {
	n.create(pod("noimage", "true", func(p *v1.Pod) { p.Spec.Containers[0].Image = "127.0.0.1:1/none:1" }))
	n.until("noimage", "failing to pull", waitingFor("main", "ErrImagePull"))
	p := n.until("noimage", "backing off", waitingFor("main", "ImagePullBackOff"))
	require.Contains(t, status(p, "main").State.Waiting.Message, `Back-off pulling image "127.0.0.1:1/none:1"`)
	require.Equal(t, v1.PodPending, p.Status.Phase)
	require.Contains(t, n.recorded(), "Failed to pull image")
	n.create(pod("neverpull", "true", func(p *v1.Pod) {
		p.Spec.Containers[0].Image, p.Spec.Containers[0].ImagePullPolicy = "test.local/none:1", v1.PullNever
	}))
	n.until("neverpull", "refused", waitingFor("main", "ErrImageNeverPull"))
}

func testMissingConfig(t *testing.T, n *node) {
	n.create(pod("config", "sleep 1000", func(p *v1.Pod) {
		p.Spec.Containers[0].Env = []v1.EnvVar{{Name: "A", ValueFrom: &v1.EnvVarSource{ConfigMapKeyRef: &v1.ConfigMapKeySelector{
			LocalObjectReference: v1.LocalObjectReference{Name: "late"}, Key: "a"}}}}
	}))
	p := n.until("config", "waiting for its ConfigMap", waitingFor("main", "CreateContainerConfigError"))
	require.Equal(t, `configmaps "late" not found`, status(p, "main").State.Waiting.Message)
	begin := time.Now()
	_, err := n.client.CoreV1().ConfigMaps(namespace).Create(context.Background(), &v1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "late", Namespace: namespace, UID: "late"}, Data: map[string]string{"a": "b"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	n.until("config", "running", running)
	require.Less(t, time.Since(begin), 5*time.Second, "the ConfigMap's arrival wakes the pod")
}

func testConfigUpdate(t *testing.T, n *node) {
	ctx := context.Background()
	maps := n.client.CoreV1().ConfigMaps(namespace)
	cm, err := maps.Create(ctx, &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "live", Namespace: namespace, UID: "live"}, Data: map[string]string{"k": "old"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	mode := int32(0o644)
	p := n.create(pod("live", "sleep 1000", func(p *v1.Pod) {
		p.Labels = map[string]string{"color": "red"}
		p.Spec.Volumes = []v1.Volume{
			{Name: "cm", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "live"}, DefaultMode: &mode}}},
			{Name: "me", VolumeSource: v1.VolumeSource{DownwardAPI: &v1.DownwardAPIVolumeSource{DefaultMode: &mode, Items: []v1.DownwardAPIVolumeFile{
				{Path: "labels", FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.labels"}}}}}},
		}
		p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{{Name: "cm", MountPath: "/cm"}, {Name: "me", MountPath: "/me"}}
	}))
	n.until("live", "running", running)
	require.Equal(t, "old", n.exec("live", "main", "cat", "/cm/k"))
	cm.Data = map[string]string{"k": "new"}
	_, err = maps.Update(ctx, cm, metav1.UpdateOptions{})
	require.NoError(t, err)
	p = n.get(p.Name)
	p.Labels = map[string]string{"color": "blue"}
	_, err = n.client.CoreV1().Pods(namespace).Update(ctx, p, metav1.UpdateOptions{})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		return n.exec("live", "main", "cat", "/cm/k") == "new" && n.exec("live", "main", "cat", "/me/labels") == `color="blue"`
	}, wait, 20*time.Millisecond)
}

func testHooks(t *testing.T, n *node) {
	dir := t.TempDir()
	directory := v1.HostPathDirectory
	n.create(pod("hooks", "sleep 1000 & wait", func(p *v1.Pod) {
		p.Spec.TerminationGracePeriodSeconds = seconds(10)
		p.Spec.Volumes = []v1.Volume{{Name: "host", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: dir, Type: &directory}}}}
		c := &p.Spec.Containers[0]
		c.VolumeMounts = []v1.VolumeMount{{Name: "host", MountPath: "/host"}}
		c.Lifecycle = &v1.Lifecycle{
			PostStart: &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{"touch", "/host/started"}}},
			PreStop:   &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{"touch", "/host/stopping"}}},
		}
	}))
	n.until("hooks", "running", running)
	require.FileExists(t, filepath.Join(dir, "started"))
	n.remove("hooks", 2)
	n.until("hooks", "gone", gone)
	require.FileExists(t, filepath.Join(dir, "stopping"))
	require.DirExists(t, dir, "a hostPath is never removed")
}

func testForceDelete(t *testing.T, n *node) {
	n.create(pod("forced", "trap '' TERM; while true; do sleep 0.1; done", func(p *v1.Pod) { p.Spec.TerminationGracePeriodSeconds = seconds(60) }))
	n.until("forced", "running", running)
	n.remove("forced", 60)
	begin := time.Now()
	zero := int64(0)
	p := n.get("forced")
	p.DeletionGracePeriodSeconds = &zero
	_, err := n.client.CoreV1().Pods(namespace).Update(context.Background(), p, metav1.UpdateOptions{})
	require.NoError(t, err)
	n.until("forced", "gone", gone)
	require.Less(t, time.Since(begin), 15*time.Second, "a shorter grace period cuts the one under way")
	require.Eventually(t, func() bool { return len(n.containersOf("forced")) == 0 }, wait, 50*time.Millisecond)
	require.NoDirExists(t, filepath.Join(n.dir, "agent", "pods", string(p.UID)))
}

func testEphemeral(t *testing.T, n *node) {
	n.create(pod("debugged", "sleep 1000"))
	p := n.until("debugged", "running", running)
	p = p.DeepCopy()
	p.Generation++
	p.Spec.EphemeralContainers = []v1.EphemeralContainer{{EphemeralContainerCommon: v1.EphemeralContainerCommon(container("debug", "sleep 1000"))}}
	_, err := n.client.CoreV1().Pods(namespace).Update(context.Background(), p, metav1.UpdateOptions{})
	require.NoError(t, err)
	p = n.until("debugged", "debugged", func(p *v1.Pod) bool { return status(p, "debug").State.Running != nil })
	require.Equal(t, v1.PodRunning, p.Status.Phase)
	require.Zero(t, status(p, "main").RestartCount)
}

func testDeadline(t *testing.T, n *node) {
	n.create(pod("late", "sleep 1000", never, func(p *v1.Pod) { p.Spec.ActiveDeadlineSeconds = seconds(2) }))
	p := n.until("late", "failed", phase(v1.PodFailed))
	require.Equal(t, "DeadlineExceeded", p.Status.Reason)
	require.Equal(t, "Pod was active on the node longer than the specified deadline", p.Status.Message)
	require.NotNil(t, status(p, "main").State.Terminated)
}

func testAdmission(t *testing.T, n *node) {
	n.create(pod("huge", "sleep 1000", func(p *v1.Pod) {
		p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceCPU: resource.MustParse("1000")}
	}))
	p := n.until("huge", "rejected", phase(v1.PodFailed))
	require.Equal(t, "OutOfcpu", p.Status.Reason)
	require.Contains(t, p.Status.Message, "Pod was rejected: Node didn't have enough resource: cpu, requested: 1000000, used:")
	n.create(pod("elsewhere", "sleep 1000", func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{"no": "such"} }))
	p = n.until("elsewhere", "rejected", phase(v1.PodFailed))
	require.Equal(t, "NodeAffinity", p.Status.Reason)
	n.remove("huge", 0)
	n.until("huge", "gone", gone)
}

func testEnvironment(t *testing.T, n *node) {
	ctx := context.Background()
	_, err := n.client.CoreV1().Secrets(namespace).Create(ctx, &v1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "env", Namespace: namespace}, Data: map[string][]byte{"user": []byte("admin")}}, metav1.CreateOptions{})
	require.NoError(t, err)
	field := func(name, path string) v1.EnvVar {
		return v1.EnvVar{Name: name, ValueFrom: &v1.EnvVarSource{FieldRef: &v1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
	}
	yes := true
	n.create(pod("env", "sleep 1000", func(p *v1.Pod) {
		c := &p.Spec.Containers[0]
		c.Resources.Limits = v1.ResourceList{v1.ResourceMemory: resource.MustParse("64Mi")}
		c.Resources.Requests = c.Resources.Limits
		c.EnvFrom = []v1.EnvFromSource{{Prefix: "S_", SecretRef: &v1.SecretEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "env"}}},
			{ConfigMapRef: &v1.ConfigMapEnvSource{LocalObjectReference: v1.LocalObjectReference{Name: "nowhere"}, Optional: &yes}}}
		c.Env = []v1.EnvVar{{Name: "BASE", Value: "b"}, {Name: "JOINED", Value: "$(BASE)-$(S_user)-$$(BASE)-$(NONE)"},
			field("POD", "metadata.name"), field("IP", "status.podIP"), field("NODE", "spec.nodeName"),
			{Name: "MEM", ValueFrom: &v1.EnvVarSource{ResourceFieldRef: &v1.ResourceFieldSelector{Resource: "limits.memory", Divisor: resource.MustParse("1Mi")}}}}
		p.Spec.Hostname, p.Spec.Subdomain = "me", "sub"
		p.Spec.HostAliases = []v1.HostAlias{{IP: "1.2.3.4", Hostnames: []string{"alias"}}}
	}))
	p := n.until("env", "running", running)
	env := n.exec("env", "main", "env")
	for _, want := range []string{"S_user=admin", "JOINED=b-admin-$(BASE)-$(NONE)", "POD=env", "IP=" + p.Status.PodIP, "NODE=" + nodeName, "MEM=64",
		"KUBERNETES_SERVICE_HOST=10.43.0.1", "KUBERNETES_SERVICE_PORT_HTTPS=443"} {
		require.Contains(t, strings.Split(env, "\n"), want)
	}
	require.Equal(t, "me", n.exec("env", "main", "hostname"))
	require.Contains(t, n.exec("env", "main", "cat", "/etc/hosts"), p.Status.PodIP+"\tme.sub.default.svc.cluster.local\tme")
	require.Contains(t, n.exec("env", "main", "cat", "/etc/hosts"), "1.2.3.4\talias")
	resolv := n.exec("env", "main", "cat", "/etc/resolv.conf")
	require.Contains(t, resolv, "nameserver 10.43.0.10")
	require.Contains(t, resolv, "search default.svc.cluster.local svc.cluster.local cluster.local")
	limit, err := os.ReadFile(filepath.Join("/sys/fs/cgroup/memory", n.cgroup, "pod"+string(p.UID), "memory.limit_in_bytes"))
	if err == nil {
		require.Equal(t, "67108864", strings.TrimSpace(string(limit)), "limit of the pod's cgroup")
	}
}

func testVolumes(t *testing.T, n *node) {
	_, err := n.client.CoreV1().Secrets(namespace).Create(context.Background(), &v1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "vol", Namespace: namespace}, Data: map[string][]byte{"pass": []byte("word")}}, metav1.CreateOptions{})
	require.NoError(t, err)
	mode, group := int32(0o400), int64(1234)
	limit := resource.MustParse("1Mi")
	n.create(pod("volumes", "sleep 1000", withToken, func(p *v1.Pod) {
		p.Spec.SecurityContext.FSGroup = &group
		p.Spec.Volumes = append(p.Spec.Volumes,
			v1.Volume{Name: "secret", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "vol", DefaultMode: &mode}}},
			v1.Volume{Name: "disk", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}},
			v1.Volume{Name: "mem", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: v1.StorageMediumMemory, SizeLimit: &limit}}})
		c := &p.Spec.Containers[0]
		c.Env = []v1.EnvVar{{Name: "WHO", Value: "who"}}
		c.VolumeMounts = append(c.VolumeMounts, v1.VolumeMount{Name: "secret", MountPath: "/secret"}, v1.VolumeMount{Name: "disk", MountPath: "/disk"},
			v1.VolumeMount{Name: "disk", MountPath: "/sub", SubPathExpr: "a/$(WHO)"}, v1.VolumeMount{Name: "mem", MountPath: "/mem"})
	}))
	p := n.until("volumes", "running", running)
	sh := func(cmd string) string { return n.exec("volumes", "main", "sh", "-c", cmd) }
	require.Equal(t, "word", sh("cat /secret/pass"))
	require.Equal(t, "440", sh("stat -Lc %a /secret/pass"), "fsGroup may read it")
	require.Equal(t, "1234", sh("stat -c %g /disk"))
	require.Equal(t, "x", sh("echo x > /sub/f; cat /disk/a/who/f"))
	require.Contains(t, sh("mount"), " /mem type tmpfs")
	require.Contains(t, sh("mount"), "size=1024k")
	require.Equal(t, "TOKEN CERT default", sh("cd /var/run/secrets/kubernetes.io/serviceaccount; echo $(cat token) $(cat ca.crt) $(cat namespace)"))
	n.remove("volumes", 1)
	n.until("volumes", "gone", gone)
	require.NoDirExists(t, filepath.Join(n.dir, "agent", "pods", string(p.UID)))
}

func testResize(t *testing.T, n *node) {
	n.create(pod("resized", "sleep 1000", func(p *v1.Pod) {
		p.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceCPU: resource.MustParse("200m"), v1.ResourceMemory: resource.MustParse("64Mi")}
		p.Spec.Containers[0].Resources.Requests = p.Spec.Containers[0].Resources.Limits
		p.Spec.Containers[0].ResizePolicy = []v1.ContainerResizePolicy{
			{ResourceName: v1.ResourceCPU, RestartPolicy: v1.NotRequired}, {ResourceName: v1.ResourceMemory, RestartPolicy: v1.NotRequired}}
	}))
	p := n.until("resized", "running", running).DeepCopy()
	p.Generation++
	more := v1.ResourceList{v1.ResourceCPU: resource.MustParse("300m"), v1.ResourceMemory: resource.MustParse("96Mi")}
	p.Spec.Containers[0].Resources.Limits, p.Spec.Containers[0].Resources.Requests = more, more
	_, err := n.client.CoreV1().Pods(namespace).Update(context.Background(), p, metav1.UpdateOptions{})
	require.NoError(t, err)
	p = n.until("resized", "resized", func(p *v1.Pod) bool {
		r := status(p, "main").Resources
		return r != nil && r.Limits.Memory().String() == "96Mi" && r.Limits.Cpu().String() == "300m" && condition(p, v1.PodResizeInProgress) == ""
	})
	require.Zero(t, status(p, "main").RestartCount)
	b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup/memory", n.cgroup, "pod"+string(p.UID), n.containerID("resized", "main"), "memory.limit_in_bytes"))
	if err == nil {
		require.Equal(t, "100663296", strings.TrimSpace(string(b)))
	}
}

func testHostNetwork(t *testing.T, n *node) {
	n.create(pod("onhost", "httpd -f -p 127.0.0.1:18080", func(p *v1.Pod) {
		p.Spec.HostNetwork = true
		p.Spec.Containers[0].ReadinessProbe = &v1.Probe{ProbeHandler: v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt32(18080)}},
			TimeoutSeconds: 1, PeriodSeconds: 10, SuccessThreshold: 1, FailureThreshold: 3}
	}))
	begin := time.Now()
	p := n.until("onhost", "ready", running)
	t.Logf("ready after %v with a period of 10 s", time.Since(begin))
	require.Equal(t, "127.0.0.1", p.Status.PodIP)
	require.Less(t, time.Since(begin), 8*time.Second)
}

func testStorageLimit(t *testing.T, n *node) {
	limit := resource.MustParse("64Ki")
	n.create(pod("greedy", "head -c 200000 /dev/zero > /data/f; sleep 1000", func(p *v1.Pod) {
		p.Spec.Volumes = []v1.Volume{{Name: "data", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{SizeLimit: &limit}}}}
		p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{{Name: "data", MountPath: "/data"}}
	}))
	p := n.until("greedy", "evicted", phase(v1.PodFailed))
	require.Equal(t, "Evicted", p.Status.Reason)
	require.Equal(t, `Usage of EmptyDir volume "data" exceeds the limit "64Ki". `, p.Status.Message)
	require.Equal(t, v1.ConditionTrue, condition(p, v1.DisruptionTarget))
}
