package main

import (
	"context"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
)

var (
	gadgets     = schema.GroupVersionResource{Group: "bench.example.com", Version: "v1", Resource: "gadgets"}
	definitions = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
)

func gadgetName(i int) string { return fmt.Sprintf("g-%06d", i) }

func gadget(name string, i int) map[string]any {
	return map[string]any{"apiVersion": gadgets.GroupVersion().String(), "kind": "Gadget",
		"metadata": map[string]any{"name": name, "labels": map[string]any{"app": "bench", "shard": fmt.Sprint(i % 10)}},
		"spec":     map[string]any{"size": int64(i%100 + 1), "color": "green", "parts": []any{"a", "b"}}}
}

// definition has a small structural schema: bounds, an enumeration, a default, a list, a status of its own.
func definition() *unstructured.Unstructured {
	object := func(properties map[string]any) map[string]any {
		return map[string]any{"type": "object", "properties": properties}
	}
	text, number := map[string]any{"type": "string"}, map[string]any{"type": "integer"}
	schema := object(map[string]any{
		"spec": object(map[string]any{
			"size":  map[string]any{"type": "integer", "minimum": int64(1), "maximum": int64(100)},
			"color": map[string]any{"type": "string", "enum": []any{"red", "green"}},
			"level": map[string]any{"type": "integer", "default": int64(3)},
			"parts": map[string]any{"type": "array", "items": text},
		}),
		"status": object(map[string]any{"phase": text, "observed": number}),
	})
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": definitions.GroupVersion().String(), "kind": "CustomResourceDefinition",
		"metadata": map[string]any{"name": gadgets.Resource + "." + gadgets.Group},
		"spec": map[string]any{
			"group": gadgets.Group, "scope": "Namespaced", "names": map[string]any{"plural": gadgets.Resource, "kind": "Gadget"},
			"versions": []any{map[string]any{"name": gadgets.Version, "served": true, "storage": true,
				"subresources": map[string]any{"status": map[string]any{}}, "schema": map[string]any{"openAPIV3Schema": schema}}},
		}}}
}

// define makes the definition and waits until objects of it are accepted.
func (b *bench) define(ctx context.Context) error {
	d := definition()
	w, err := b.dynamic.Resource(definitions).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + d.GetName()})
	if err != nil {
		return err
	}
	defer w.Stop()
	if _, err := b.dynamic.Resource(definitions).Create(ctx, d, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	for e := range w.ResultChan() {
		if u, ok := e.Object.(*unstructured.Unstructured); ok && established(u) {
			return b.firstGadget(ctx)
		}
	}
	return errors.New("the definition of a custom resource is not established")
}

func established(u *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	for _, c := range conditions {
		if m, ok := c.(map[string]any); ok && m["type"] == "Established" && m["status"] == "True" {
			return true
		}
	}
	return false
}

// firstGadget asks until the resource is served, which upstream's server does a moment after it said so.
func (b *bench) firstGadget(ctx context.Context) error {
	for {
		_, err := b.dynamic.Resource(gadgets).Namespace(b.namespace).List(ctx, metav1.ListOptions{})
		if err == nil || !apierrors.IsNotFound(err) {
			return err
		}
	}
}

// undefine removes the definition and waits until it is gone.
func (b *bench) undefine(ctx context.Context) error {
	name := definition().GetName()
	w, err := b.dynamic.Resource(definitions).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return err
	}
	defer w.Stop()
	if err := b.dynamic.Resource(definitions).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	for e := range w.ResultChan() {
		if e.Type == watch.Deleted {
			return nil
		}
	}
	return fmt.Errorf("%s does not go away", name)
}
