// Package structural tells, without changing or copying anything, of which custom resources upstream's reading would make nothing else than they
// are: nothing is pruned, dropped or coerced (k8s.io/apiextensions-apiserver/pkg/apiserver/schema/{pruning,defaulting,objectmeta}), and fills in defaults.
// What is not plainly so (embedded resources, nulls that are not allowed, metadata in an unusual form) it does not know.
package structural

import (
	"time"

	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apimachinery/pkg/runtime"
)

// Schema is a structural schema as far as it says what an object is made of. It is immutable and safe for concurrent use; nil is one that
// allows no field.
type Schema struct {
	properties map[string]*Schema
	// defaulted are the properties with defaults, and these.
	defaulted map[string]any
	items     *Schema
	// open says that there may be other properties, which are like additional; nil: they have no fields.
	open       bool
	additional *Schema
	// preserves says that unknown properties stay; embedded that this is a resource; nullable that null is a value.
	preserves, embedded, nullable bool
}

// New takes what is needed of a structural schema; nil gives nil.
func New(s *structuralschema.Structural) *Schema {
	if s == nil {
		return nil
	}
	out := &Schema{items: New(s.Items), preserves: s.XPreserveUnknownFields, embedded: s.XEmbeddedResource, nullable: s.Nullable}
	if s.AdditionalProperties != nil {
		out.open, out.additional = true, New(s.AdditionalProperties.Structural)
	}
	if len(s.Properties) > 0 {
		out.properties = make(map[string]*Schema, len(s.Properties))
	}
	for name := range s.Properties {
		p := s.Properties[name]
		out.properties[name] = New(&p)
		if p.Default.Object == nil {
			continue
		}
		if out.defaulted == nil {
			out.defaulted = map[string]any{}
		}
		out.defaulted[name] = p.Default.Object
	}
	return out
}

// meta are the fields of every resource, which no schema prunes.
func meta(name string) bool { return name == "apiVersion" || name == "kind" || name == "metadata" }

// Complete fills in the defaults that are missing in an object, and says whether nothing else would change it; if not, it may be filled in part. Only
// maps in which something is missing are written to.
func (s *Schema) Complete(obj map[string]any) bool { return s.root(obj, true) }

// Holds says that reading a stored object gives the same again: there is nothing to prune and nothing to fill in, and its metadata is in the form
// in which it is always written.
func (s *Schema) Holds(obj map[string]any) bool {
	m, ok := obj["metadata"].(map[string]any)
	if !ok || !Metadata(m) || !s.root(obj, false) {
		return false
	}
	generation, ok := m["generation"].(int64)
	_, dated := m["creationTimestamp"].(string)
	return ok && generation != 0 && dated
}

// root checks a whole object, but not its metadata.
func (s *Schema) root(obj map[string]any, fill bool) bool {
	if s == nil || s.embedded || s.open {
		return false
	}
	for name, p := range s.properties {
		if meta(name) && (!p.plain() || s.defaulted[name] != nil) {
			return false
		}
	}
	if !s.complete(obj, fill) {
		return false
	}
	for name, v := range obj {
		if meta(name) {
			continue
		}
		p, known := s.properties[name]
		switch {
		case !known:
			if !s.preserves {
				return false
			}
		case v == nil:
			if !p.nullable {
				return false
			}
		case !p.check(v, false, fill):
			return false
		}
	}
	return true
}

// plain says that a schema has no defaults.
func (s *Schema) plain() bool {
	if s == nil {
		return true
	}
	for _, p := range s.properties {
		if !p.plain() {
			return false
		}
	}
	return len(s.defaulted) == 0 && s.items.plain() && s.additional.plain()
}

// complete fills in defaults, or says whether there are any to fill in.
func (s *Schema) complete(obj map[string]any, fill bool) bool {
	for name, value := range s.defaulted {
		if _, there := obj[name]; there {
			continue
		}
		if !fill {
			return false
		}
		obj[name] = runtime.DeepCopyJSONValue(value)
	}
	return true
}

// check checks a value; keeps says that its unknown fields stay, because it is in a list that says so.
func (s *Schema) check(v any, keeps, fill bool) bool {
	switch v := v.(type) {
	case map[string]any:
		return s.fields(v, keeps, fill)
	case []any:
		return s.elements(v, keeps, fill)
	}
	return true
}

func (s *Schema) fields(v map[string]any, keeps, fill bool) bool {
	if s == nil {
		return keeps || len(v) == 0
	}
	if s.embedded || !s.complete(v, fill) {
		return false
	}
	for name, field := range v {
		p, known := s.properties[name]
		if !known && !s.open {
			if !keeps && !s.preserves {
				return false
			}
			continue
		}
		if !known {
			p = s.additional
		}
		if field == nil {
			if p != nil && !p.nullable {
				return false
			}
			continue
		}
		if !p.check(field, false, fill) {
			return false
		}
	}
	return true
}

func (s *Schema) elements(v []any, keeps, fill bool) bool {
	var items *Schema
	if s != nil {
		items, keeps = s.items, keeps || s.preserves
	}
	for _, e := range v {
		if e == nil {
			if items != nil && !items.nullable {
				return false
			}
			continue
		}
		if !items.check(e, keeps, fill) {
			return false
		}
	}
	return true
}

// Metadata says that an object's metadata is in the form in which upstream writes it after reading it: no field is unknown, empty or of another type.
func Metadata(m map[string]any) bool {
	for name, v := range m {
		ok := false
		switch name {
		case "name", "namespace", "generateName", "uid", "resourceVersion", "selfLink":
			ok = isText(v)
		case "generation":
			n, is := v.(int64)
			ok = is && n != 0
		case "deletionGracePeriodSeconds":
			_, ok = v.(int64)
		case "creationTimestamp", "deletionTimestamp":
			ok = isTime(v)
		case "labels", "annotations":
			ok = areTexts(v)
		case "finalizers":
			ok = isList(v, func(e any) bool { _, is := e.(string); return is })
		case "ownerReferences":
			ok = isList(v, isOwner)
		case "managedFields":
			ok = isList(v, isManaged)
		}
		if !ok {
			return false
		}
	}
	return true
}

func isText(v any) bool {
	s, ok := v.(string)
	return ok && s != ""
}

// isTime tells times as they are written: in UTC, without fractions of a second.
func isTime(v any) bool {
	s, ok := v.(string)
	if !ok || len(s) != len("2006-01-02T15:04:05Z") || s[len(s)-1] != 'Z' {
		return false
	}
	t, err := time.Parse(time.RFC3339, s)
	return err == nil && !t.IsZero()
}

func areTexts(v any) bool {
	m, ok := v.(map[string]any)
	if !ok || len(m) == 0 {
		return false
	}
	for _, e := range m {
		if _, ok := e.(string); !ok {
			return false
		}
	}
	return true
}

func isList(v any, of func(any) bool) bool {
	l, ok := v.([]any)
	if !ok || len(l) == 0 {
		return false
	}
	for _, e := range l {
		if !of(e) {
			return false
		}
	}
	return true
}

func isOwner(v any) bool {
	m, ok := v.(map[string]any)
	if !ok {
		return false
	}
	texts := 0
	for name, field := range m {
		switch name {
		case "apiVersion", "kind", "name", "uid":
			_, ok = field.(string)
			texts++
		case "controller", "blockOwnerDeletion":
			_, ok = field.(bool)
		default:
			ok = false
		}
		if !ok {
			return false
		}
	}
	return texts == 4
}

func isManaged(v any) bool {
	m, ok := v.(map[string]any)
	if !ok {
		return false
	}
	for name, field := range m {
		switch name {
		case "manager", "operation", "apiVersion", "fieldsType", "subresource":
			ok = isText(field)
		case "time":
			ok = isTime(field)
		case "fieldsV1":
			_, ok = field.(map[string]any)
		default:
			ok = false
		}
		if !ok {
			return false
		}
	}
	return true
}
