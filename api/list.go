package api

import (
	"context"
	"errors"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"

	"knarr/store"
)

const (
	// messageContinueExpired is what upstream says when a page's snapshot is gone.
	messageContinueExpired = "The provided continue parameter is too old " +
		"to display a consistent list result. You can start a new list without " +
		"the continue parameter, or use the continue token in this response to " +
		"retrieve the remainder of the results. Continuing with the provided " +
		"token results in an inconsistent list - objects that were created, " +
		"modified, or deleted between the time the first chunk was returned " +
		"and now may show up in the list."
	messageVersionExpired = "The provided from resource version is too old."
)

// A Selection is what one list or watch wants of a table. Its zero value is of no use: make it with a prefix.
type Selection struct {
	// Prefix is the key prefix, or the whole key when Exact.
	Prefix string
	Exact  bool
	// Label is tested on the stored object, without a copy; nil selects all.
	Label labels.Selector
	// Match is an additional test (fields, shards); nil selects all. It may not change the record.
	Match func(*store.Record) bool

	marks uint64 // of Label; zero: unknown
}

// Matches reports whether the record belongs to the selection, its key aside.
func (s *Selection) Matches(rec *store.Record) bool {
	return s.selects(rec.Labels()) && (s.Match == nil || s.Match(rec))
}

// selects is the part of Matches that labels decide.
func (s *Selection) selects(set *store.LabelSet) bool {
	if s.Label == nil || s.Label.Empty() {
		return true
	}
	if s.marks != 0 && (set == nil || set.Marks(marksOf)&s.marks != s.marks) {
		return false
	}
	return s.Label.Matches(labels.Set(set.Labels()))
}

// choices remember what a selection has decided of label sets. Records with the same often lie side by side.
type choices [64]struct {
	set    *store.LabelSet
	chosen bool
}

// selects is s.selects, asked once for most sets.
func (c *choices) selects(s *Selection, set *store.LabelSet) bool {
	if set == nil {
		return s.selects(nil)
	}
	known := &c[set.Number()%uint32(len(c))]
	if known.set != set {
		known.set, known.chosen = set, s.selects(set)
	}
	return known.chosen
}

func (s *Selection) empty() bool {
	return s.Match == nil && (s.Label == nil || s.Label.Empty())
}

// A Page is one answer to a list: records of one consistent snapshot, in the order of their keys.
type Page struct {
	Records []*store.Record
	// Revision is the list's resourceVersion.
	Revision int64
	// Continue is empty on the last page.
	Continue string
	// Remaining is nil when unknown, as with any selector.
	Remaining *int64
}

// List answers a list request with upstream's meaning of resourceVersion, resourceVersionMatch, limit and continue.
// Errors are API status errors: 410 Expired for a snapshot that is gone, 400 for a bad token.
func (k *Kind) List(sel Selection, opts storage.ListOptions) (*Page, error) {
	page := &Page{}
	return page, k.ListInto(page, sel, opts)
}

// ListInto is List into a page of the caller's, whose slice of records is used again. After an error the page is of no use.
func (k *Kind) ListInto(page *Page, sel Selection, opts storage.ListOptions) error {
	var versioner storage.APIObjectVersioner
	exact, from, err := storage.ValidateListOptions(sel.Prefix, versioner, opts)
	if err != nil {
		return err
	}
	if err := k.notNewer(versioner, opts.ResourceVersion); err != nil {
		return err
	}
	snap, err := k.snapshot(exact, from, sel.Prefix)
	if err != nil {
		return err
	}
	*page = Page{Revision: snap.Revision(), Records: page.Records[:0]}
	if exact > 0 {
		page.Revision = exact
	}
	if sel.Exact {
		if rec := snap.Get(sel.Prefix); rec != nil && sel.Matches(rec) {
			page.Records = append(page.Records, rec)
		}
		return nil
	}
	return k.fill(page, snap, sel, from, opts)
}

// snapshot finds the state to answer from: the present one, or the kept one of an exact revision.
func (k *Kind) snapshot(exact int64, from, prefix string) (*store.Snapshot, error) {
	if exact <= 0 {
		return k.Table.Snapshot(), nil
	}
	snap, err := k.Table.SnapshotAt(exact)
	if err == nil {
		return snap, nil
	}
	var future *store.FutureError
	if errors.As(err, &future) {
		return nil, storage.NewTooLargeResourceVersionError(uint64(future.Requested), uint64(future.Current), 1)
	}
	var gone *store.GoneError
	if !errors.As(err, &gone) {
		return nil, err
	}
	if from == "" {
		return nil, apierrors.NewResourceExpired(messageVersionExpired)
	}
	token, err := storage.EncodeContinue(from, prefix, -1)
	if err != nil {
		return nil, apierrors.NewResourceExpired(messageContinueExpired)
	}
	expired := apierrors.NewResourceExpired(messageContinueExpired)
	expired.ErrStatus.ListMeta.Continue = token
	return nil, expired
}

// fill collects the page and its continue token, and keeps the snapshot for the next page.
func (k *Kind) fill(page *Page, snap *store.Snapshot, sel Selection, from string, opts storage.ListOptions) error {
	limit, more := opts.Predicate.Limit, false
	var last *store.Record
	var known choices
	snap.AscendLabeled(sel.Prefix, max(from, sel.Prefix), func(rec *store.Record, set *store.LabelSet) bool {
		if limit > 0 && int64(len(page.Records)) >= limit {
			more = true
			return false
		}
		last = rec
		if known.selects(&sel, set) && (sel.Match == nil || sel.Match(rec)) {
			page.Records = append(page.Records, rec)
		}
		return true
	})
	if !more {
		return nil
	}
	token, err := storage.EncodeContinue(last.Key+"\x00", sel.Prefix, page.Revision)
	if err != nil {
		return err
	}
	page.Continue = token
	if sel.empty() {
		rest := int64(0)
		snap.Ascend(sel.Prefix, last.Key+"\x00", func(*store.Record) bool { rest++; return true })
		page.Remaining = &rest
	}
	k.Table.Pin(snap)
	return nil
}

// GetList implements storage.Interface.
func (s *Storage) GetList(ctx context.Context, key string, opts storage.ListOptions, out runtime.Object) error {
	prefix, err := s.listKey(key, opts.Recursive)
	if err != nil {
		return err
	}
	if err := s.kind.Fresh(ctx, opts.ResourceVersion); err != nil {
		return err
	}
	page, err := s.kind.List(s.selection(prefix, opts), opts)
	if err != nil {
		return err
	}
	items, err := s.items(page.Records, out)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return storage.NewTimeoutError(prefix, "request did not complete within requested timeout")
	}
	listPtr, err := meta.GetItemsPtr(out)
	if err != nil {
		return err
	}
	reflect.ValueOf(listPtr).Elem().Set(items)
	return s.versioner.UpdateList(out, uint64(page.Revision), page.Continue, page.Remaining)
}

// items makes private copies of the records in a slice of the list's item type; never nil.
func (s *Storage) items(recs []*store.Record, list runtime.Object) (reflect.Value, error) {
	listPtr, err := meta.GetItemsPtr(list)
	if err != nil {
		return reflect.Value{}, err
	}
	v := reflect.MakeSlice(reflect.TypeOf(listPtr).Elem(), 0, len(recs))
	for _, rec := range recs {
		obj, err := s.kind.form.fromStored(rec)
		if err != nil {
			return v, fmt.Errorf("read %s: %w", rec.Key, err)
		}
		v = reflect.Append(v, reflect.ValueOf(obj).Elem())
	}
	return v, nil
}

// selection turns upstream's predicate into tests on records.
func (s *Storage) selection(prefix string, opts storage.ListOptions) Selection {
	sel := Selection{Prefix: prefix, Exact: !opts.Recursive, Label: opts.Predicate.Label, marks: marksFor(opts.Predicate.Label)}
	if opts.Predicate.Field != nil && !opts.Predicate.Field.Empty() {
		sel.Match = s.kind.fieldMatch(opts.Predicate)
	}
	return sel
}

// fieldMatch tests a field selector: on fields that are read off the stored object where that is enough, else on the hub type's fields.
func (k *Kind) fieldMatch(p storage.SelectionPredicate) func(*store.Record) bool {
	isPod, plain := k.Stored == corev1.SchemeGroupVersion.WithKind("Pod"), true
	for _, r := range p.Field.Requirements() {
		plain = plain && (r.Field == fieldName || r.Field == fieldNamespace || isPod && r.Field == fieldNode)
	}
	if plain {
		return func(rec *store.Record) bool {
			m, err := meta.Accessor(rec.Object)
			if err != nil {
				return false
			}
			pod, _ := rec.Object.(*corev1.Pod)
			return p.Field.Matches(plainFields{m, pod})
		}
	}
	read := k.form.fromStored
	if !k.Plain() {
		read = k.Served // its attributes are read off the tree
	}
	return func(rec *store.Record) bool {
		obj, err := read(rec)
		if err != nil {
			return false
		}
		_, set, err := p.GetAttrs(obj)
		return err == nil && p.Field.Matches(set)
	}
}

// Fields that need no conversion. That of a pod's node is what each node's agent watches by: converting each pod for each node would be most of
// what a change of a pod costs.
const (
	fieldName      = "metadata.name"
	fieldNamespace = "metadata.namespace"
	fieldNode      = "spec.nodeName"
)

// plainFields offers an object's name and namespace, and a pod's node, to a field selector without a map.
type plainFields struct {
	m   metav1.Object
	pod *corev1.Pod // nil: another kind
}

func (f plainFields) Has(field string) bool {
	return field == fieldName || field == fieldNamespace || field == fieldNode && f.pod != nil
}

func (f plainFields) Get(field string) string {
	switch {
	case field == fieldName:
		return f.m.GetName()
	case field == fieldNamespace:
		return f.m.GetNamespace()
	case field == fieldNode && f.pod != nil:
		return f.pod.Spec.NodeName
	}
	return ""
}
