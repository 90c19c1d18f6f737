// Command podbench measures what a person waits for: from the creation of a pod to its phase Running, seen through a watch;
// one pod after another, then many at once, then until all are gone. It runs against any Kubernetes whose nodes have
// the image.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"knarr/bench/load"
)

// Bounds.
const (
	oneTimeout   = time.Minute
	burstTimeout = 5 * time.Minute
)

type bench struct {
	kubernetes.Interface
	namespace string
	image     string
	watched   load.Groups
	json      bool // how to print
	events    <-chan watch.Event
	created   map[string]time.Time
	running   map[string]time.Time
	gone      map[string]time.Time
}

func main() {
	kubeconfig := flag.String("kubeconfig", os.Getenv("KUBECONFIG"), "kubeconfig of the cluster")
	pids := flag.String("pids", "", "processes of the cluster: 1,2 or several groups, server=1,2;all=/sys/fs/cgroup/cpuacct/x (a control group)")
	one := flag.Int("one", 10, "pods one after another")
	burst := flag.Int("burst", 60, "pods at once")
	b := bench{namespace: "podbench", created: map[string]time.Time{}, running: map[string]time.Time{}, gone: map[string]time.Time{}}
	flag.StringVar(&b.image, "image", "busybox:1", "image with a sleep, on every node")
	flag.BoolVar(&b.json, "json", false, "print one JSON object a phase")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := b.run(ctx, *kubeconfig, *pids, *one, *burst); err != nil {
		fmt.Fprintln(os.Stderr, "podbench:", err)
		os.Exit(1)
	}
}

func (b *bench) run(ctx context.Context, kubeconfig, pids string, one, burst int) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1
	if b.Interface, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if b.watched, err = load.ParseGroups(pids); err != nil {
		return err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: b.namespace}}
	if _, err := b.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	w, err := b.CoreV1().Pods(b.namespace).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	defer w.Stop()
	b.events = w.ResultChan()
	if err := b.oneByOne(ctx, one); err != nil {
		return err
	}
	if err := b.atOnce(ctx, burst); err != nil {
		return err
	}
	if err := b.remove(ctx, one+burst); err != nil {
		return err
	}
	return b.CoreV1().Namespaces().Delete(ctx, b.namespace, metav1.DeleteOptions{})
}

// create makes a pod that sleeps; one that is refused because the namespace is too young is tried again.
func (b *bench) create(ctx context.Context, name string) error {
	grace, mount := int64(1), false
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{
		TerminationGracePeriodSeconds: &grace, AutomountServiceAccountToken: &mount,
		Containers: []corev1.Container{{Name: "main", Image: b.image, ImagePullPolicy: corev1.PullNever, Command: []string{"sleep", "3600"}}}}}
	for end := time.Now().Add(oneTimeout); ; time.Sleep(10 * time.Millisecond) {
		b.created[name] = time.Now()
		_, err := b.CoreV1().Pods(b.namespace).Create(ctx, pod, metav1.CreateOptions{})
		if !apierrors.IsForbidden(err) || time.Now().After(end) {
			return err
		}
	}
}

// await reads events until done says so.
func (b *bench) await(ctx context.Context, limit time.Duration, what string, done func() bool) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for !done() {
		select {
		case e, open := <-b.events:
			if !open {
				return fmt.Errorf("%s: the watch ended", what)
			}
			if p, ok := e.Object.(*corev1.Pod); ok {
				b.note(e.Type, p)
			}
		case <-timer.C:
			return fmt.Errorf("%s: not within %v: %d of %d run, %d are gone", what, limit, len(b.running), len(b.created), len(b.gone))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (b *bench) note(t watch.EventType, p *corev1.Pod) {
	if _, known := b.running[p.Name]; !known && p.Status.Phase == corev1.PodRunning {
		b.running[p.Name] = time.Now()
	}
	if t == watch.Deleted {
		b.gone[p.Name] = time.Now()
	}
}

func (b *bench) oneByOne(ctx context.Context, n int) error {
	var took []time.Duration
	cpu, begin := b.watched.CPU(), time.Now()
	for i := range n {
		name := fmt.Sprintf("one-%d", i)
		if err := b.create(ctx, name); err != nil {
			return err
		}
		if err := b.await(ctx, oneTimeout, name, func() bool { return !b.running[name].IsZero() }); err != nil {
			return err
		}
		took = append(took, b.running[name].Sub(b.created[name]))
	}
	b.print("pod start, one by one", begin, cpu, n, took)
	return nil
}

func (b *bench) print(name string, begin time.Time, cpu map[string]time.Duration, n int, took []time.Duration) {
	r := load.Result{Name: name, Ops: n, Elapsed: time.Since(begin), CPU: b.watched.Since(cpu), Memory: b.watched.Memory()}
	r.Set(took)
	_ = r.Print(os.Stdout, b.json)
}

func (b *bench) atOnce(ctx context.Context, n int) error {
	cpu, begin := b.watched.CPU(), time.Now()
	before := len(b.running)
	for i := range n {
		if err := b.create(ctx, fmt.Sprintf("burst-%d", i)); err != nil {
			return err
		}
	}
	if err := b.await(ctx, burstTimeout, "burst", func() bool { return len(b.running) == before+n }); err != nil {
		return err
	}
	var took []time.Duration
	for i := range n {
		name := fmt.Sprintf("burst-%d", i)
		took = append(took, b.running[name].Sub(b.created[name]))
	}
	b.print("pod start, all at once", begin, cpu, n, took)
	return nil
}

func (b *bench) remove(ctx context.Context, n int) error {
	cpu, begin := b.watched.CPU(), time.Now()
	if err := b.CoreV1().Pods(b.namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		return err
	}
	if err := b.await(ctx, burstTimeout, "delete", func() bool { return len(b.gone) == n }); err != nil {
		return err
	}
	var took []time.Duration
	for _, at := range b.gone {
		took = append(took, at.Sub(begin))
	}
	b.print("pod delete", begin, cpu, n, took) // of each pod: the grace period is 1 s
	return nil
}
