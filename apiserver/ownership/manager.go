package ownership

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
	"sigs.k8s.io/structured-merge-diff/v6/typed"
)

// maxUpdaters is how many managers of updates an object keeps before upstream merges the oldest.
const maxUpdaters = 10

// unknownManager is who writes without a name.
const unknownManager = "unknown"

// fieldsType is the only type of sets that there is.
const fieldsType = "FieldsV1"

// Manager keeps the managed fields of one kind, as one resource or subresource writes it. It is immutable and safe for
// concurrent use.
type Manager struct {
	shape       *shape
	goType      reflect.Type
	zero        reflect.Value
	version     string
	subresource string
}

// New makes the manager of a kind. example is an empty object of the version that is written, typed the same as structured-merge-diff sees
// it (only its schema and type are used), reset are the fields that the resource's strategy resets. It fails for a kind that it
// does not know well enough.
func New(example runtime.Object, typ *typed.TypedValue, gv schema.GroupVersion, subresource string, reset *fieldpath.Set) (*Manager, error) {
	t := reflect.TypeOf(example).Elem()
	b := &shaper{schema: typ.Schema(), known: map[shapeKey]*shape{}}
	s := b.build(t, typ.TypeRef())
	if s.kind != structure || s.atomic {
		return nil, fmt.Errorf("ownership: the schema does not know %s", t)
	}
	s, err := hide(s, []string{"metadata", "managedFields"}, true)
	if err != nil {
		return nil, err
	}
	if reset != nil {
		paths, err := names(reset)
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			if s, err = hide(s, p, false); err != nil {
				return nil, err
			}
		}
	}
	s.findSure(map[*shape]bool{})
	return &Manager{shape: s, goType: t, zero: reflect.New(t).Elem(), version: gv.String(), subresource: subresource}, nil
}

// names gives the paths of a set as lists of field names.
func names(set *fieldpath.Set) (out [][]string, err error) {
	set.Iterate(func(p fieldpath.Path) {
		var path []string
		for _, e := range p {
			if e.FieldName == nil {
				err = fmt.Errorf("ownership: %s is no field of a structure", p)
				return
			}
			path = append(path, *e.FieldName)
		}
		out = append(out, path)
	})
	return out, err
}

// work is what one update needs; it is kept for the next.
type work struct {
	differ
	sets  [3]paths
	bytes []byte
}

var works = sync.Pool{New: func() any { return new(work) }}

// Update sets the managed fields of obj after manager turned live into it; live is nil for a new object. Both are of the
// manager's type and version, and live is not changed; they may share what entries point to afterwards. It gives false, and leaves obj alone, when only upstream's field manager knows
// the result.
func (m *Manager) Update(live, obj runtime.Object, manager string, now time.Time) bool {
	after, err := meta.Accessor(obj)
	if err != nil || reflect.TypeOf(obj).Elem() != m.goType || live != nil && reflect.TypeOf(live) != reflect.TypeOf(obj) {
		return false
	}
	if manager == "" {
		manager = unknownManager
	}
	entries, ok := m.before(live, after)
	if !ok || !plain(manager) {
		return false
	}
	if live != nil && len(entries) == 0 {
		after.SetManagedFields(nil)
		return true
	}
	w := works.Get().(*work)
	defer works.Put(w)
	left := m.zero
	if live != nil {
		left = reflect.ValueOf(live).Elem()
	}
	if !w.run(m.shape, left, reflect.ValueOf(obj).Elem()) {
		return false
	}
	out, ok := m.entries(w, entries, manager, now)
	if !ok {
		return false
	}
	after.SetManagedFields(out)
	return true
}

// before gives the entries that an update starts from.
func (m *Manager) before(live runtime.Object, after metav1.Object) ([]metav1.ManagedFieldsEntry, bool) {
	given := after.GetManagedFields()
	if live == nil {
		return nil, given == nil
	}
	acc, err := meta.Accessor(live)
	if err != nil || acc.GetUID() == "" {
		return nil, false
	}
	if m.subresource == "" && len(given) > 0 {
		return given, true
	}
	if m.subresource == "" && given != nil {
		return nil, false // an empty list resets
	}
	return acc.GetManagedFields(), true
}

// run compares two objects.
func (w *work) run(s *shape, l, r reflect.Value) bool {
	w.refused = false
	w.changed.reset()
	w.removed.reset()
	w.items = w.items[:0]
	w.values(s, operand{v: l}, operand{v: r}, root, root)
	return !w.refused
}

// stripped are the fields that nobody owns.
var stripped = map[string]bool{"f:name": true, "f:namespace": true, "f:creationTimestamp": true, "f:selfLink": true, "f:uid": true,
	"f:clusterName": true, "f:generation": true, "f:managedFields": true, "f:resourceVersion": true}

// strip copies the changes without what nobody owns.
func (w *work) strip(out *paths) {
	out.reset()
	in := &w.changed
	for x := in.nodes[root].child; x != 0; x = in.nodes[x].next {
		switch n := &in.nodes[x]; n.elem {
		case "f:apiVersion", "f:kind":
		case "f:metadata":
			i := out.add(root, n.elem)
			for y := n.child; y != 0; y = in.nodes[y].next {
				if stripped[in.nodes[y].elem] {
					continue
				}
				j := out.add(i, in.nodes[y].elem)
				out.nodes[j].member = in.nodes[y].member
				out.copy(j, in, y)
			}
			out.dropEmpty(root, i)
		default:
			i := out.add(root, n.elem)
			out.nodes[i].member = n.member
			out.copy(i, in, x)
		}
	}
}

// entries gives the new list of entries.
func (m *Manager) entries(w *work, before []metav1.ManagedFieldsEntry, manager string, now time.Time) ([]metav1.ManagedFieldsEntry, bool) {
	own, set := &w.sets[0], &w.sets[1]
	w.strip(own)
	out := make([]metav1.ManagedFieldsEntry, 0, len(before)+1)
	self, updaters := false, 0
	for i := range before {
		e := before[i]
		if !m.usable(&e) || slices.ContainsFunc(before[:i], func(b metav1.ManagedFieldsEntry) bool { return same(&b, &e) }) {
			return nil, false
		}
		p := parser{}
		if !p.parse(e.FieldsV1.GetRawString(), set, m.shape) {
			return nil, false
		}
		mine := !own.empty() && e.Operation == metav1.ManagedFieldsOperationUpdate && e.Manager == manager && e.Subresource == m.subresource
		if mine {
			self = true
			e.Time = &metav1.Time{Time: now.UTC()}
		}
		if !w.settle(&e, set, mine) {
			continue
		}
		if e.Operation == metav1.ManagedFieldsOperationUpdate {
			updaters++
		}
		out = append(out, e)
	}
	if !self && !own.empty() {
		updaters++
		out = append(out, metav1.ManagedFieldsEntry{Manager: manager, Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: m.version,
			Time: &metav1.Time{Time: now.UTC()}, FieldsType: fieldsType, FieldsV1: w.encode(own), Subresource: m.subresource})
	}
	if updaters > maxUpdaters {
		return nil, false
	}
	slices.SortFunc(out, order)
	if len(out) == 0 {
		return nil, true
	}
	return out, true
}

// usable says whether an entry is one that we know.
func (m *Manager) usable(e *metav1.ManagedFieldsEntry) bool {
	return e.APIVersion == m.version && e.FieldsType == fieldsType && e.FieldsV1 != nil && e.Manager != "" && plain(e.Manager) && plain(e.Subresource) &&
		(e.Operation == metav1.ManagedFieldsOperationUpdate || e.Operation == metav1.ManagedFieldsOperationApply)
}

// same says whether two entries of one version are of the same manager.
func same(a, b *metav1.ManagedFieldsEntry) bool {
	return a.Operation == b.Operation && a.Manager == b.Manager && a.Subresource == b.Subresource
}

// settle takes from an entry what changed or went away, and adds the changes to the entry of who made them. It gives false
// when nothing is left.
func (w *work) settle(e *metav1.ManagedFieldsEntry, set *paths, mine bool) bool {
	if !mine && !touches(set, root, &w.changed, root) && !touches(set, root, &w.removed, root) {
		return true
	}
	next := w.sets[2].reset()
	next.without(root, set, root, &w.changed, root)
	set, next = next, set.reset()
	next.without(root, set, root, &w.removed, root)
	set, next = next, set.reset()
	if mine {
		next.union(root, set, root, &w.sets[0], root)
		set = next
	}
	if set.empty() {
		return false
	}
	e.FieldsV1 = w.encode(set)
	return true
}

func (w *work) encode(set *paths) *metav1.FieldsV1 {
	w.bytes = set.append(w.bytes[:0], root)
	out := &metav1.FieldsV1{}
	out.SetRawBytes(w.bytes)
	return out
}

// order is how the entries of an object are sorted.
func order(a, b metav1.ManagedFieldsEntry) int {
	if c := strings.Compare(string(a.Operation), string(b.Operation)); c != 0 {
		return c
	}
	if as, bs := seconds(a.Time), seconds(b.Time); as != bs {
		if as < bs {
			return -1
		}
		return 1
	}
	if c := strings.Compare(a.Manager, b.Manager); c != 0 {
		return c
	}
	if c := strings.Compare(a.APIVersion, b.APIVersion); c != 0 {
		return c
	}
	return strings.Compare(a.Subresource, b.Subresource)
}

func seconds(t *metav1.Time) int64 {
	if t == nil {
		return 0
	}
	return t.Unix()
}
