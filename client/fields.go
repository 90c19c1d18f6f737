package client

import (
	"fmt"
	"strconv"

	batchv1 "k8s.io/api/batch/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
)

// Fields returns the selectable fields of an object, as the field selectors of its resource know them.
type Fields func(obj runtime.Object) (fields.Set, error)

// SelectableFields knows the selectable fields that upstream's in-process informers use: metadata of every object, and the documented
// fields of pods, nodes, namespaces, secrets, jobs and certificate signing requests. A selector on another field is an error of the
// informer's construction, never a silent match.
func SelectableFields(obj runtime.Object) (fields.Set, error) {
	s, err := MetadataFields(obj)
	if err != nil {
		return nil, err
	}
	switch o := obj.(type) {
	case *corev1.Pod:
		podFields(s, o)
	case *corev1.Node:
		s["spec.unschedulable"] = strconv.FormatBool(o.Spec.Unschedulable)
	case *corev1.Namespace:
		s["status.phase"] = string(o.Status.Phase)
	case *corev1.Secret:
		s["type"] = string(o.Type)
	case *batchv1.Job:
		s["status.successful"] = strconv.Itoa(int(o.Status.Succeeded))
	case *certificatesv1.CertificateSigningRequest:
		s["spec.signerName"] = o.Spec.SignerName
	}
	return s, nil
}

// MetadataFields are the selectable fields that every object has.
func MetadataFields(obj runtime.Object) (fields.Set, error) {
	s := fields.Set{"metadata.name": "", "metadata.namespace": ""}
	if obj == nil {
		return s, nil
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil, fmt.Errorf("selectable fields of %T: %w", obj, err)
	}
	s["metadata.name"], s["metadata.namespace"] = m.GetName(), m.GetNamespace()
	return s, nil
}

func podFields(s fields.Set, p *corev1.Pod) {
	s["spec.nodeName"] = p.Spec.NodeName
	s["spec.restartPolicy"] = string(p.Spec.RestartPolicy)
	s["spec.schedulerName"] = p.Spec.SchedulerName
	s["spec.serviceAccountName"] = p.Spec.ServiceAccountName
	s["spec.hostNetwork"] = strconv.FormatBool(p.Spec.HostNetwork)
	s["status.phase"] = string(p.Status.Phase)
	s["status.podIP"] = p.Status.PodIP
	s["status.nominatedNodeName"] = p.Status.NominatedNodeName
}

// filter decides which objects of a table a view shows. The zero value shows all.
type filter struct {
	namespace string
	labels    labels.Selector // nil is all
	fields    fields.Selector // nil is all
	fieldsOf  Fields
}

// newFilter parses a scope. example is an object of the resource; it shows whether the selected fields are known.
func newFilter(s scope, fieldsOf Fields, example runtime.Object) (filter, error) {
	f := filter{namespace: s.namespace, fieldsOf: fieldsOf}
	if s.labelSelector != "" {
		sel, err := labels.Parse(s.labelSelector)
		if err != nil {
			return filter{}, fmt.Errorf("label selector %q: %w", s.labelSelector, err)
		}
		f.labels = sel
	}
	if s.fieldSelector == "" {
		return f, nil
	}
	sel, err := fields.ParseSelector(s.fieldSelector)
	if err != nil {
		return filter{}, fmt.Errorf("field selector %q: %w", s.fieldSelector, err)
	}
	known, err := fieldsOf(example)
	if err != nil {
		return filter{}, err
	}
	for _, r := range sel.Requirements() {
		if !known.Has(r.Field) {
			return filter{}, fmt.Errorf("field selector %q: %T has no selectable field %q", s.fieldSelector, example, r.Field)
		}
	}
	f.fields = sel
	return f, nil
}

func (f *filter) all() bool { return f.namespace == "" && f.labels == nil && f.fields == nil }

// matches says whether the view shows obj. An object that has no metadata is not shown.
func (f *filter) matches(obj runtime.Object) bool {
	if f.all() {
		return true
	}
	m, err := meta.Accessor(obj)
	if err != nil || f.namespace != "" && m.GetNamespace() != f.namespace {
		return false
	}
	if f.labels != nil && !f.labels.Matches(labels.Set(m.GetLabels())) {
		return false
	}
	if f.fields == nil {
		return true
	}
	set, err := f.fieldsOf(obj)
	return err == nil && f.fields.Matches(set)
}
