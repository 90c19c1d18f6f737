// Command apibench loads an API server and prints one line a phase: operations a second, how long one takes, what the
// server's processes (-pids) spent on it and have in memory. It runs against any Kubernetes; its pods are never scheduled.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"knarr/bench/load"
)

// The watch phase: each of watchers sees watchChanges changes.
const (
	watchChanges = 500
	watchTimeout = 2 * time.Minute
	startTimeout = 20 * time.Second
)

type bench struct {
	kubernetes.Interface
	namespace string
	objects   int
	workers   int
	watchers  int
	pids      load.PIDs
	failed    bool
}

func main() {
	kubeconfig := flag.String("kubeconfig", os.Getenv("KUBECONFIG"), "kubeconfig of the server")
	pids := flag.String("pids", "", "processes of the server, comma-separated")
	b := bench{namespace: "apibench"}
	flag.IntVar(&b.objects, "n", 5000, "objects of each kind")
	flag.IntVar(&b.workers, "c", 32, "requests at the same time")
	flag.IntVar(&b.watchers, "w", 100, "watchers")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := b.run(ctx, *kubeconfig, *pids); err != nil {
		fmt.Fprintln(os.Stderr, "apibench:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, kubeconfig, pids string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1
	config.ContentType, config.AcceptContentTypes = "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf,application/json"
	if b.Interface, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if b.pids, err = load.ParsePIDs(pids); err != nil {
		return err
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	b.writesAndReads(ctx)
	if err := b.watch(ctx); err != nil {
		return err
	}
	b.deletes(ctx)
	err = b.CoreV1().Namespaces().Delete(ctx, b.namespace, metav1.DeleteOptions{})
	if b.failed {
		return fmt.Errorf("some requests failed")
	}
	return err
}

// prepare makes the namespace and waits for its service account, without which no pod is admitted.
func (b *bench) prepare(ctx context.Context) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: b.namespace}}
	if _, err := b.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	w, err := b.CoreV1().ServiceAccounts(b.namespace).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		if sa, ok := e.Object.(*corev1.ServiceAccount); ok && sa.Name == "default" {
			return nil
		}
	}
	return fmt.Errorf("namespace %s gets no service account", b.namespace)
}

func (b *bench) phase(ctx context.Context, name string, ops, workers int, f func(ctx context.Context, i int) error) {
	r := load.Run(ctx, name, b.pids, ops, workers, f)
	b.failed = b.failed || r.Errors > 0
	fmt.Println(r)
}

func podName(i int) string { return fmt.Sprintf("p-%06d", i) }
func mapName(i int) string { return fmt.Sprintf("c-%06d", i) }

func (b *bench) pod(i int) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: podName(i), Labels: map[string]string{"app": "bench", "shard": strconv.Itoa(i % 10)}},
		Spec: corev1.PodSpec{
			NodeSelector: map[string]string{"apibench": "never"},
			Containers: []corev1.Container{{Name: "main", Image: "registry.example/app:v1", Env: []corev1.EnvVar{{Name: "NAME", Value: "value"}},
				Ports: []corev1.ContainerPort{{ContainerPort: 8080}}}},
		},
	}
}

func (b *bench) writesAndReads(ctx context.Context) {
	pods, maps := b.CoreV1().Pods(b.namespace), b.CoreV1().ConfigMaps(b.namespace)
	data := map[string]string{"key": strings.Repeat("x", 200)}
	b.phase(ctx, "create ConfigMap", b.objects, b.workers, func(ctx context.Context, i int) error {
		_, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: mapName(i)}, Data: data}, metav1.CreateOptions{})
		return err
	})
	b.phase(ctx, "create Pod", b.objects, b.workers, func(ctx context.Context, i int) error {
		_, err := pods.Create(ctx, b.pod(i), metav1.CreateOptions{})
		return err
	})
	b.phase(ctx, "get Pod", 2*b.objects, b.workers, func(ctx context.Context, i int) error {
		_, err := pods.Get(ctx, podName(i%b.objects), metav1.GetOptions{})
		return err
	})
	status := []byte(`{"status":{"phase":"Running","podIP":"10.1.2.3"}}`)
	b.phase(ctx, "patch Pod status", b.objects, b.workers, func(ctx context.Context, i int) error {
		_, err := pods.Patch(ctx, podName(i), types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status")
		return err
	})
	b.phase(ctx, "list all Pods", 20, 2, func(ctx context.Context, _ int) error {
		return wantItems(b.objects)(pods.List(ctx, metav1.ListOptions{ResourceVersion: "0"}))
	})
	b.phase(ctx, "list a tenth by label", 40, 2, func(ctx context.Context, _ int) error {
		return wantItems((b.objects + 6) / 10)(pods.List(ctx, metav1.ListOptions{LabelSelector: "shard=3"}))
	})
}

// wantItems makes a short list a failure.
func wantItems(n int) func(*corev1.PodList, error) error {
	return func(l *corev1.PodList, err error) error {
		if err == nil && len(l.Items) != n {
			err = fmt.Errorf("%d items instead of %d", len(l.Items), n)
		}
		return err
	}
}

// watch changes objects while many watch: every watcher must see every change.
func (b *bench) watch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	maps := b.CoreV1().ConfigMaps(b.namespace)
	list, err := maps.List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return err
	}
	changes := min(watchChanges, b.objects)
	var watchers []watch.Interface
	for range b.watchers {
		w, err := maps.Watch(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion})
		if err != nil {
			return err
		}
		defer w.Stop()
		watchers = append(watchers, w)
	}
	var seen atomic.Int64
	var wg sync.WaitGroup
	cpu, begin := b.pids.CPU(), time.Now()
	for _, w := range watchers {
		wg.Go(func() {
			for n := 0; n < changes; {
				e, open := <-w.ResultChan()
				if !open {
					return
				}
				if e.Type == watch.Modified {
					n++
					seen.Add(1)
				}
			}
		})
	}
	r := load.Run(ctx, "", b.pids, changes, 4, func(ctx context.Context, i int) error {
		_, err := maps.Patch(ctx, mapName(i), types.MergePatchType, []byte(`{"data":{"other":"y"}}`), metav1.PatchOptions{})
		return err
	})
	wg.Wait()
	d, spent := time.Since(begin), b.pids.CPU()-cpu
	fmt.Printf("%-24s %7d events of %d to %d watchers, %.0f /s, server %.2f us/event\n", "watch", seen.Load(), changes*b.watchers, b.watchers,
		float64(seen.Load())/d.Seconds(), float64(spent.Microseconds())/float64(max(seen.Load(), 1)))
	if r.Errors > 0 || seen.Load() != int64(changes*b.watchers) {
		b.failed = true
		return fmt.Errorf("watch: %d changes failed (%v), %d events are missing", r.Errors, r.First, int64(changes*b.watchers)-seen.Load())
	}
	return nil
}

func (b *bench) deletes(ctx context.Context) {
	now := int64(0)
	b.phase(ctx, "delete Pod", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.CoreV1().Pods(b.namespace).Delete(ctx, podName(i), metav1.DeleteOptions{GracePeriodSeconds: &now})
	})
	b.phase(ctx, "delete ConfigMap", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.CoreV1().ConfigMaps(b.namespace).Delete(ctx, mapName(i), metav1.DeleteOptions{})
	})
}
