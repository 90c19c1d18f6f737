package apiserver

import (
	"fmt"
	"strings"
	"sync"
	_ "unsafe" // for go:linkname

	"go.yaml.in/yaml/v2"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/client-go/applyconfigurations"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	smdschema "sigs.k8s.io/structured-merge-diff/v6/schema"
	"sigs.k8s.io/structured-merge-diff/v6/typed"
)

// schemaText is client-go's compiled schema of all built-in kinds, which has no name outside of its package. Empty where that keeps it
// elsewhere; a test tells.
//
//go:linkname schemaText k8s.io/client-go/applyconfigurations/internal.schemaYAML
var schemaText typed.YAMLObject

// Marks in schemaText: where the next type begins, and where a type refers to another.
const (
	schemaHead = "types:\n"
	typeMark   = "- name: "
	typeRef    = "namedType: "
)

// newTypeConverter knows the built-in kinds by client-go's compiled schema.
func newTypeConverter() (managedfields.TypeConverter, error) {
	if schemaText == "" {
		return applyconfigurations.NewTypeConverter(legacyscheme.Scheme), nil
	}
	return &kindTypes{scheme: legacyscheme.Scheme, texts: splitSchema(string(schemaText)), parsed: map[string]smdschema.TypeDef{}}, nil
}

// splitSchema gives the text of each type by its name.
func splitSchema(text string) map[string]string {
	texts := map[string]string{}
	rest := "\n" + strings.TrimPrefix(text, schemaHead)
	for {
		_, after, found := strings.Cut(rest, "\n"+typeMark)
		if !found {
			return texts
		}
		name, _, _ := strings.Cut(after, "\n")
		end := strings.Index(after, "\n"+typeMark)
		if end < 0 {
			end = len(after)
		}
		texts[name] = typeMark + strings.TrimSuffix(after[:end], "\n") + "\n"
		rest = after[end:]
	}
}

// kindTypes is a schema of which only the types of the kinds in use are read: reading all of them was a quarter of the processor time
// of a start. Safe for concurrent use.
type kindTypes struct {
	scheme *runtime.Scheme
	texts  map[string]string
	kinds  sync.Map // managedfields.TypeConverter by schema.GroupVersionKind

	mu     sync.Mutex
	parsed map[string]smdschema.TypeDef // guarded by mu
}

// ObjectToTyped implements managedfields.TypeConverter.
func (k *kindTypes) ObjectToTyped(obj runtime.Object, opts ...typed.ValidationOptions) (*typed.TypedValue, error) {
	types, err := k.kind(obj.GetObjectKind().GroupVersionKind())
	if err != nil {
		return nil, err
	}
	return types.ObjectToTyped(obj, opts...)
}

// TypedToObject implements managedfields.TypeConverter.
func (k *kindTypes) TypedToObject(value *typed.TypedValue) (runtime.Object, error) {
	return managedfields.NewSchemeTypeConverter(k.scheme, nil).TypedToObject(value) // it needs no schema
}

// kind is the converter of one kind. One without a type has a converter that says so.
func (k *kindTypes) kind(gvk schema.GroupVersionKind) (managedfields.TypeConverter, error) {
	if t, found := k.kinds.Load(gvk); found {
		return t.(managedfields.TypeConverter), nil
	}
	name, err := k.scheme.ToOpenAPIDefinitionName(gvk)
	if err != nil {
		return nil, err
	}
	parser, err := k.parser(name)
	if err != nil {
		return nil, err
	}
	t, _ := k.kinds.LoadOrStore(gvk, managedfields.NewSchemeTypeConverter(k.scheme, parser))
	return t.(managedfields.TypeConverter), nil
}

// parser knows a type and all that it refers to. Parsers share their types.
func (k *kindTypes) parser(name string) (*typed.Parser, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	names := k.reached(name)
	if err := k.parse(names); err != nil {
		return nil, err
	}
	p := &typed.Parser{Schema: smdschema.Schema{Types: make([]smdschema.TypeDef, 0, len(names))}}
	for _, n := range names {
		p.Schema.Types = append(p.Schema.Types, k.parsed[n])
	}
	return p, nil
}

// reached lists the type and what it refers to, as far as there are such types.
func (k *kindTypes) reached(name string) []string {
	var names []string
	seen := map[string]bool{name: true}
	for next := []string{name}; len(next) > 0; {
		n := next[len(next)-1]
		next = next[:len(next)-1]
		text, found := k.texts[n]
		if !found {
			continue
		}
		names = append(names, n)
		for _, line := range strings.Split(text, typeRef)[1:] {
			if to, _, _ := strings.Cut(line, "\n"); !seen[to] {
				seen[to] = true
				next = append(next, to)
			}
		}
	}
	return names
}

// parse reads those types that nobody has read yet. The caller holds mu.
func (k *kindTypes) parse(names []string) error {
	var text strings.Builder
	text.WriteString(schemaHead)
	for _, n := range names {
		if _, found := k.parsed[n]; !found {
			text.WriteString(k.texts[n])
		}
	}
	if text.Len() == len(schemaHead) {
		return nil
	}
	// A typed.Parser would read it twice, the first time to see whether it is a schema.
	var read smdschema.Schema
	if err := yaml.Unmarshal([]byte(text.String()), &read); err != nil {
		return fmt.Errorf("schema of the built-in kinds: %w", err)
	}
	for _, t := range read.Types {
		k.parsed[t.Name] = t
	}
	return nil
}
