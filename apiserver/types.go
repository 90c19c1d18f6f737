package apiserver

import (
	"strings"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	extensionsopenapi "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/managedfields"
	endpointsopenapi "k8s.io/apiserver/pkg/endpoints/openapi"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	aggregatoropenapi "k8s.io/kube-aggregator/pkg/generated/openapi"
	"k8s.io/kube-openapi/pkg/builder3"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/util"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"sigs.k8s.io/structured-merge-diff/v6/typed"

	genericapiserver "k8s.io/apiserver/pkg/server"
)

// get builds the converter at the first call.
func (l *lazyTypes) get() (managedfields.TypeConverter, error) {
	l.once.Do(func() { l.types, l.err = l.make() })
	return l.types, l.err
}

// ObjectToTyped implements managedfields.TypeConverter.
func (l *lazyTypes) ObjectToTyped(obj runtime.Object, opts ...typed.ValidationOptions) (*typed.TypedValue, error) {
	types, err := l.get()
	if err != nil {
		return nil, err
	}
	value, err := types.ObjectToTyped(obj, opts...)
	if err != nil && strings.Contains(err.Error(), unknownType) {
		// Kinds that are never stored (reviews) are not in the schema; their shape is all that is known of them.
		return managedfields.NewDeducedTypeConverter().ObjectToTyped(obj, opts...)
	}
	return value, err
}

// unknownType is how structured-merge-diff says that a schema lacks a type.
const unknownType = "no type found matching"

// TypedToObject implements managedfields.TypeConverter.
func (l *lazyTypes) TypedToObject(value *typed.TypedValue) (runtime.Object, error) {
	types, err := l.get()
	if err != nil {
		return nil, err
	}
	return types.TypedToObject(value)
}

// extraKind is a kind that is not in client-go's schema, but in documents of the part of upstream that it comes from: those have a tenth of the types
// of the whole, each of which takes its time to make.
type extraKind struct {
	object      runtime.Object
	definitions common.GetOpenAPIDefinitions
	scheme      *runtime.Scheme
}

var (
	apiServiceKind = extraKind{&apiregistrationv1.APIService{}, aggregatoropenapi.GetOpenAPIDefinitions, aggregatorscheme.Scheme}
	definitionKind = extraKind{&apiextensionsv1.CustomResourceDefinition{}, extensionsopenapi.GetOpenAPIDefinitions, apiextensionsserver.Scheme}
)

// schema gives the types that the kind is made of.
func (k extraKind) schema() (map[string]*spec.Schema, error) {
	config := genericapiserver.DefaultOpenAPIV3Config(k.definitions, endpointsopenapi.NewDefinitionNamer(k.scheme))
	return builder3.BuildOpenAPIDefinitionsForResources(config, util.GetCanonicalTypeName(k.object))
}

// lazyTypes know the kind.
func (k extraKind) lazyTypes() *lazyTypes {
	return &lazyTypes{make: func() (managedfields.TypeConverter, error) {
		schema, err := k.schema()
		if err != nil {
			return nil, err
		}
		return managedfields.NewTypeConverter(schema, false)
	}}
}
