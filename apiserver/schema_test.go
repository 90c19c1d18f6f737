package apiserver

import (
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	smdschema "sigs.k8s.io/structured-merge-diff/v6/schema"
	"sigs.k8s.io/structured-merge-diff/v6/typed"
)

// Each kind's own part of the schema is what the whole schema says of it.
func TestKindTypes(t *testing.T) {
	require.NotEmpty(t, schemaText, "client-go keeps its schema elsewhere: all of it is read at each start")
	whole, err := typed.NewParser(schemaText)
	require.NoError(t, err)
	made, err := newTypeConverter()
	require.NoError(t, err)
	k := made.(*kindTypes)
	require.Len(t, k.texts, len(whole.Schema.Types))

	types := map[string]smdschema.TypeDef{}
	for _, t := range whole.Schema.Types {
		types[t.Name] = t
	}
	checked := 0
	for gvk := range legacyscheme.Scheme.AllKnownTypes() {
		name, err := legacyscheme.Scheme.ToOpenAPIDefinitionName(gvk)
		if err != nil || !whole.Type(name).IsValid() {
			continue
		}
		checked++
		p, err := k.parser(name)
		require.NoError(t, err, name)
		require.True(t, p.Type(name).IsValid(), name)
		for _, part := range p.Schema.Types {
			require.Equal(t, types[part.Name], part)
			for _, to := range k.reached(part.Name) {
				require.True(t, p.Type(to).IsValid(), "%s refers to %s", part.Name, to)
			}
		}
	}
	require.Greater(t, checked, 100)

	// Kinds outside of the schema get upstream's error, by which lazyTypes knows them.
	p, err := k.parser("no.such.Type")
	require.NoError(t, err)
	_, err = p.Type("no.such.Type").FromYAML("{}")
	require.ErrorContains(t, err, unknownType)
}

// TestExtraKinds: the types that a kind is made of are the same in the documents of its part as in those of the whole.
func TestExtraKinds(t *testing.T) {
	for _, k := range []extraKind{apiServiceKind, definitionKind} {
		own, err := k.schema()
		require.NoError(t, err)
		k.definitions = getDefinitions
		whole, err := k.schema()
		require.NoError(t, err)
		require.Greater(t, len(own), 5)
		require.Equal(t, whole, own)
	}
}
