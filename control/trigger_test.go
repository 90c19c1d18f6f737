package control

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
)

// A controller that has nothing to do is not there, and is there as soon as it has.
func TestTriggers(t *testing.T) {
	for name, tc := range map[string]struct {
		triggers  []trigger
		no, fires func(ctx context.Context, c *fake.Clientset) error
	}{
		"any object": {on("v1", "persistentvolumes", "persistentvolumeclaims"), createPod(&corev1.PodSpec{}, nil), func(ctx context.Context, c *fake.Clientset) error {
			_, err := c.CoreV1().PersistentVolumeClaims("n").Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "c"}}, metav1.CreateOptions{})
			return err
		}},
		"secret of a type": {[]trigger{secretOf(corev1.SecretTypeServiceAccountToken)}, createSecret(corev1.SecretTypeOpaque), createSecret(corev1.SecretTypeServiceAccountToken)},
		"pod with an ephemeral volume": {[]trigger{podWith(ephemeralVolume)}, createPod(&corev1.PodSpec{}, nil),
			createPod(&corev1.PodSpec{Volumes: []corev1.Volume{{VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}}}}, nil)},
		"pod with an attachable volume": {[]trigger{podWith(attachableVolume)},
			createPod(&corev1.PodSpec{Volumes: []corev1.Volume{{VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}}, nil),
			createPod(&corev1.PodSpec{Volumes: []corev1.Volume{{VolumeSource: corev1.VolumeSource{ISCSI: &corev1.ISCSIVolumeSource{}}}}}, nil)},
		"pod that is being disrupted": {[]trigger{podWith(disruptionTarget)}, createPod(&corev1.PodSpec{}, nil),
			createPod(&corev1.PodSpec{}, []corev1.PodCondition{{Type: corev1.DisruptionTarget}})},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			kube := fake.NewClientset()
			f := informers.NewSharedInformerFactory(kube, 0)
			a, err := arm(f, tc.triggers)
			require.NoError(t, err)
			f.StartWithContext(ctx)
			require.NoError(t, f.WaitForCacheSyncWithContext(ctx).AsError())
			require.NoError(t, tc.no(ctx, kube))
			select {
			case <-a.fired:
				t.Fatal("fired without a reason")
			case <-time.After(20 * time.Millisecond):
			}
			require.NoError(t, tc.fires(ctx, kube))
			require.True(t, a.wait(ctx))
			require.Empty(t, a.undo, "disarmed")
			cancel()
			f.Shutdown()
			b, err := arm(informers.NewSharedInformerFactory(kube, 0), tc.triggers)
			require.NoError(t, err)
			require.False(t, b.wait(ctx), "the end came first")
		})
	}
}

func createPod(spec *corev1.PodSpec, conditions []corev1.PodCondition) func(context.Context, *fake.Clientset) error {
	return func(ctx context.Context, c *fake.Clientset) error {
		_, err := c.CoreV1().Pods("n").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "p", Name: string(rune('a' + len(conditions) + len(spec.Volumes)))},
			Spec: *spec, Status: corev1.PodStatus{Conditions: conditions}}, metav1.CreateOptions{})
		if err != nil { // the quiet one and the loud one may have the same name
			_, err = c.CoreV1().Pods("m").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: *spec, Status: corev1.PodStatus{Conditions: conditions}}, metav1.CreateOptions{})
		}
		return err
	}
}

func createSecret(typ corev1.SecretType) func(context.Context, *fake.Clientset) error {
	return func(ctx context.Context, c *fake.Clientset) error {
		_, err := c.CoreV1().Secrets(string("n-"+typ[:1])).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Type: typ}, metav1.CreateOptions{})
		return err
	}
}

// countingDiscovery answers each call with what the test sends.
type countingDiscovery struct {
	discovery.ServerResourcesInterface
	calls chan error // what each call returns
}

func (d countingDiscovery) ServerPreferredResources() ([]*metav1.APIResourceList, error) {
	return nil, <-d.calls
}

func (d countingDiscovery) ServerPreferredNamespacedResources() ([]*metav1.APIResourceList, error) {
	return nil, <-d.calls
}

// Upstream's loops ask discovery every period; behind the gate they ask once for each change.
func TestGate(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	resets := 0
	ch := newChanges(func() { resets++ })
	d := countingDiscovery{calls: make(chan error)}
	g := gated{d, &gate{ctx: ctx, changes: ch}}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			_, _ = g.ServerPreferredResources()
		}
	}()
	quiet := func() {
		t.Helper()
		select {
		case d.calls <- nil:
			t.Fatal("asked without a reason")
		case <-time.After(20 * time.Millisecond):
		}
	}
	d.calls <- nil // the first time
	quiet()
	ch.announce()
	d.calls <- nil
	quiet()
	ch.announce()
	ch.announce() // two changes before it looks are one
	d.calls <- nil
	quiet()
	require.Equal(t, 3, resets)
	cancel()
	<-ended
	_, err := g.ServerPreferredNamespacedResources()
	require.ErrorIs(t, err, context.Canceled)
}

func TestGateRetriesFailures(t *testing.T) {
	g := gate{}
	var got []time.Duration
	for range 6 {
		g.result(errors.New("down"))
		got = append(got, g.retry)
	}
	require.Equal(t, []time.Duration{5 * time.Second, 10 * time.Second, 20 * time.Second, 40 * time.Second, time.Minute, time.Minute}, got)
	g.result(nil)
	require.Zero(t, g.retry)
}
