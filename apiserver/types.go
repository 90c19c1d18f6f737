package apiserver

import (
	"strings"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/managedfields"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	"k8s.io/kube-openapi/pkg/builder3"
	"k8s.io/kube-openapi/pkg/util"
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

// newExtensionTypeConverter knows the kinds that are not in client-go's schema: definitions and APIServices.
func newExtensionTypeConverter() (managedfields.TypeConverter, error) {
	config := genericapiserver.DefaultOpenAPIV3Config(getDefinitions, newNamer())
	defs, err := builder3.BuildOpenAPIDefinitionsForResources(config,
		util.GetCanonicalTypeName(&apiextensionsv1.CustomResourceDefinition{}),
		util.GetCanonicalTypeName(&apiregistrationv1.APIService{}))
	if err != nil {
		return nil, err
	}
	return managedfields.NewTypeConverter(defs, false)
}
