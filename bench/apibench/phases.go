package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"knarr/bench/load"
)

// startTimeout bounds the wait for what the load needs, cleanTimeout the removal.
const (
	startTimeout = 20 * time.Second
	cleanTimeout = 2 * time.Minute
)

// prepare opens the connections, makes the namespace and waits for its service account, without which no pod is admitted, or for the custom
// resource.
func (b *bench) prepare(ctx context.Context, custom bool) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: b.namespace}}
	if _, err := b.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := b.connect(ctx); err != nil {
		return err
	}
	if custom {
		return b.define(ctx)
	}
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

// cleanUp removes what the load made and waits until it is gone, so that the next load finds an empty server.
func (b *bench) cleanUp(ctx context.Context, custom bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	if custom {
		if err := b.undefine(ctx); err != nil {
			return err
		}
	}
	w, err := b.CoreV1().Namespaces().Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + b.namespace})
	if err != nil {
		return err
	}
	defer w.Stop()
	if err := b.CoreV1().Namespaces().Delete(ctx, b.namespace, metav1.DeleteOptions{}); err != nil {
		return err
	}
	for e := range w.ResultChan() {
		if e.Type == "DELETED" {
			return nil
		}
	}
	return fmt.Errorf("namespace %s does not go away", b.namespace)
}

func podName(i int) string { return fmt.Sprintf("p-%06d", i) }
func mapName(i int) string { return fmt.Sprintf("c-%06d", i) }

func (b *bench) pod(i int) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: podName(i), Labels: map[string]string{"app": "bench", "shard": strconv.Itoa(i % 10)}},
		Spec: corev1.PodSpec{
			SchedulerName: b.scheduler,
			NodeSelector:  map[string]string{"apibench": "never"},
			Containers: []corev1.Container{{Name: "main", Image: "registry.example/app:v1", Env: []corev1.EnvVar{{Name: "NAME", Value: "value"}},
				Ports: []corev1.ContainerPort{{ContainerPort: 8080}}}},
		},
	}
}

func (b *bench) configMap(i int) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: mapName(i)}, Data: map[string]string{"key": strings.Repeat("x", 200)}}
}

func (b *bench) path(resource, name string) string {
	return strings.TrimSuffix("/api/v1/namespaces/"+b.namespace+"/"+resource+"/"+name, "/")
}

// create posts the i-th object.
func (b *bench) create(ctx context.Context, i int, resource string, obj runtime.Object) error {
	body, err := b.body(obj)
	if err != nil {
		return err
	}
	return send(ctx, b.of(i).Post().AbsPath(b.path(resource, "")).SetHeader("Content-Type", b.config.ContentType).Body(body))
}

func (b *bench) patch(ctx context.Context, i int, path string, how types.PatchType, patch []byte) error {
	return send(ctx, b.of(i).Patch(how).AbsPath(path).Body(patch))
}

// builtin loads ConfigMaps and Pods.
func (b *bench) builtin(ctx context.Context) error {
	b.writes(ctx, "create ConfigMap", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.create(ctx, i, "configmaps", b.configMap(i))
	})
	b.writes(ctx, "create Pod", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.create(ctx, i, "pods", b.pod(i))
	})
	b.phase(ctx, "get Pod", 2*b.objects, b.workers, func(ctx context.Context, i int) error {
		return send(ctx, b.of(i).Get().AbsPath(b.path("pods", podName(i%b.objects))))
	})
	status := []byte(`{"status":{"phase":"Running","podIP":"10.1.2.3"}}`)
	b.writes(ctx, "patch Pod status", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.patch(ctx, i, b.path("pods", podName(i)+"/status"), types.StrategicMergePatchType, status)
	})
	if err := b.lists(ctx); err != nil {
		return err
	}
	for _, n := range b.watchers {
		if err := b.watch(ctx, n); err != nil {
			return err
		}
	}
	b.print(load.Result{Name: "memory with all objects", Memory: b.watched.Memory()})
	b.writes(ctx, "delete Pod", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.remove(ctx, i, b.path("pods", podName(i)))
	})
	b.writes(ctx, "delete ConfigMap", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.remove(ctx, i, b.path("configmaps", mapName(i)))
	})
	return nil
}

// remove deletes at once.
func (b *bench) remove(ctx context.Context, i int, path string) error {
	now := []byte(`{"apiVersion":"v1","kind":"DeleteOptions","gracePeriodSeconds":0}`)
	return send(ctx, b.of(i).Delete().AbsPath(path).SetHeader("Content-Type", asJSON).Body(now))
}

// lists asks for all pods and for a tenth of them, often enough that the 99th percentile is not the slowest one of a handful.
func (b *bench) lists(ctx context.Context) error {
	for _, l := range []struct {
		name, parameter, value string
		ops, items             int
	}{
		{"list all Pods", "resourceVersion", "0", 100, b.objects},
		{"list a tenth by label", "labelSelector", "shard=3", 200, (b.objects + 6) / 10},
	} {
		mark := []byte(podName(0)[:3]) // once in each pod
		var marks int
		err := b.listed(ctx, 0, l.parameter, l.value, func(body []byte) error {
			marks = bytes.Count(body, mark)
			decoded, err := runtime.Decode(b.decoder(), body)
			if err != nil {
				return err
			}
			if pods, ok := decoded.(*corev1.PodList); !ok || len(pods.Items) != l.items {
				return fmt.Errorf("%s: not a list of %d pods", l.name, l.items)
			}
			return nil
		})
		if err != nil {
			return err
		}
		b.phase(ctx, l.name, l.ops, 2, func(ctx context.Context, i int) error {
			return b.listed(ctx, i, l.parameter, l.value, func(body []byte) error {
				if n := bytes.Count(body, mark); n != marks {
					return fmt.Errorf("the names of pods %d times instead of %d", n, marks)
				}
				return nil
			})
		})
	}
	return nil
}

// bodies are buffers for lists. A new one for each, which has to grow to megabytes, would have this program collect garbage in the time that is measured.
var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// listed gives a list's body to look, which may not keep it.
func (b *bench) listed(ctx context.Context, i int, parameter, value string, look func(body []byte) error) error {
	r, err := b.of(i).Get().AbsPath(b.path("pods", "")).Param(parameter, value).Stream(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	body := bodies.Get().(*bytes.Buffer)
	defer bodies.Put(body)
	body.Reset()
	if _, err := body.ReadFrom(r); err != nil {
		return err
	}
	return look(body.Bytes())
}

// customResources loads objects of a definition; their encoding is JSON.
func (b *bench) customResources(ctx context.Context) {
	collection := "/apis/" + gadgets.GroupVersion().String() + "/namespaces/" + b.namespace + "/" + gadgets.Resource
	b.writes(ctx, "create custom resource", b.objects, b.workers, func(ctx context.Context, i int) error {
		body, err := json.Marshal(gadget(gadgetName(i), i))
		if err != nil {
			return err
		}
		return send(ctx, b.of(i).Post().AbsPath(collection).SetHeader("Content-Type", asJSON).Body(body))
	})
	b.phase(ctx, "get custom resource", 2*b.objects, b.workers, func(ctx context.Context, i int) error {
		return send(ctx, b.of(i).Get().AbsPath(collection+"/"+gadgetName(i%b.objects)))
	})
	status := []byte(`{"status":{"phase":"Running","observed":1}}`)
	b.writes(ctx, "patch custom resource status", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.patch(ctx, i, collection+"/"+gadgetName(i)+"/status", types.MergePatchType, status)
	})
	b.writes(ctx, "delete custom resource", b.objects, b.workers, func(ctx context.Context, i int) error {
		return b.remove(ctx, i, collection+"/"+gadgetName(i))
	})
}
