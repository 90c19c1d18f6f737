package objects

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func podWith(uid string, configMaps ...string) *v1.Pod {
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: uid, Namespace: "ns", UID: types.UID(uid)}}
	for _, name := range configMaps {
		p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: name, VolumeSource: v1.VolumeSource{
			ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: name}}}})
	}
	return p
}

func watches(c *fake.Clientset) (n int) {
	for _, a := range c.Actions() {
		if a.GetVerb() == "watch" {
			n++
		}
	}
	return n
}

func TestStore(t *testing.T) {
	defer goleak.VerifyNone(t)
	ctx, cancel := context.WithCancel(context.Background())
	cm := &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "a", Namespace: "ns"}, Data: map[string]string{"k": "1"}}
	client := fake.NewSimpleClientset(cm, &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "unrelated", Namespace: "ns"}})
	told := make(chan types.UID, 16)
	s := New(ctx, client, func(uid types.UID) { told <- uid })
	_, err := s.ConfigMap("ns", "a")
	require.ErrorContains(t, err, "not registered")
	s.Register(podWith("one", "a", "missing"))
	s.Register(podWith("two", "a"))
	got, err := s.ConfigMap("ns", "a")
	require.NoError(t, err)
	require.Equal(t, "1", got.Data["k"])
	_, err = s.ConfigMap("ns", "missing")
	require.True(t, apierrors.IsNotFound(err))
	require.Eventually(t, func() bool { return watches(client) == 2 }, 5*time.Second, time.Millisecond, "one watch per object")

	cm.Data = map[string]string{"k": "2"}
	_, err = client.CoreV1().ConfigMaps("ns").Update(ctx, cm, metav1.UpdateOptions{})
	require.NoError(t, err)
	require.ElementsMatch(t, []types.UID{"one", "two"}, []types.UID{<-told, <-told})
	got, err = s.ConfigMap("ns", "a")
	require.NoError(t, err)
	require.Equal(t, "2", got.Data["k"])
	require.NoError(t, client.CoreV1().ConfigMaps("ns").Delete(ctx, "a", metav1.DeleteOptions{}))
	<-told
	_, err = s.ConfigMap("ns", "a")
	require.True(t, apierrors.IsNotFound(err))

	s.Unregister("one")
	s.Unregister("two")
	_, err = s.ConfigMap("ns", "a")
	require.ErrorContains(t, err, "not registered")
	cancel()
	s.Wait()
}

func TestTokens(t *testing.T) {
	ctx := context.Background()
	client := fake.NewSimpleClientset()
	var fail atomic.Bool
	var issued atomic.Int32
	life := atomic.Int64{}
	life.Store(int64(time.Hour))
	client.PrependReactor("create", "serviceaccounts", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if fail.Load() {
			return true, nil, errors.New("down")
		}
		tr := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenRequest).DeepCopy()
		issued.Add(1)
		tr.Status.ExpirationTimestamp = metav1.NewTime(time.Now().Add(time.Duration(life.Load())))
		return true, tr, nil
	})
	due := make(chan types.UID, 1)
	tokens := NewTokens(ctx, client, func(uid types.UID) { due <- uid })
	defer tokens.Close()
	req := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{UID: "u"}}}
	for range 3 {
		_, err := tokens.Get("ns", "sa", req)
		require.NoError(t, err)
	}
	require.Equal(t, int32(1), issued.Load(), "a fresh token is not asked for again")
	tokens.Forget("u")
	life.Store(int64(100 * time.Millisecond))
	_, err := tokens.Get("ns", "sa", req)
	require.NoError(t, err)
	require.Equal(t, types.UID("u"), <-due, "the pod is told at 80 % of the life")
	fail.Store(true)
	_, err = tokens.Get("ns", "sa", req)
	if err != nil { // the token may have run out by now
		require.ErrorContains(t, err, "failed to fetch token")
	}
	tokens.Forget("u")
	_, err = tokens.Get("ns", "sa", req)
	require.ErrorContains(t, err, "failed to fetch token: down")
}

func TestRenewal(t *testing.T) {
	now := time.Now()
	at := func(life time.Duration) time.Duration {
		return renewal(&authenticationv1.TokenRequest{Status: authenticationv1.TokenRequestStatus{ExpirationTimestamp: metav1.NewTime(now.Add(life))}}, now).Sub(now)
	}
	require.Equal(t, 48*time.Minute, at(time.Hour))
	require.Equal(t, 24*time.Hour, at(365*24*time.Hour))
}
