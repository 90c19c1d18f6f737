package api

import (
	"reflect"

	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/kubernetes/pkg/printers"
	printerstorage "k8s.io/kubernetes/pkg/printers/storage"
)

// sharePrinters lets all REST storage types use one set of the printers of table columns. Upstream makes the same set, of all kinds, for
// each of them: 2.7 MB. The sets are only read from now on.
func sharePrinters(infos []*genericapiserver.APIGroupInfo) {
	var shared *printers.HumanReadableGenerator
	for _, info := range infos {
		for _, resources := range info.VersionedResourcesStorageMap {
			for _, storage := range resources {
				g := printersOf(storage)
				switch {
				case g == nil || g == shared:
				case shared == nil:
					shared = g
				default:
					*g = *shared // its holders, subresources among them, keep their pointer
				}
			}
		}
	}
}

// printersOf gives the printers of a storage type that is, or embeds, upstream's store; nil for others.
func printersOf(storage any) *printers.HumanReadableGenerator {
	v := reflect.ValueOf(storage)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct {
		return nil
	}
	field, ok := v.Elem().Type().FieldByName("TableConvertor")
	if !ok {
		return nil
	}
	f, err := v.Elem().FieldByIndexErr(field.Index)
	if err != nil || !f.CanInterface() {
		return nil
	}
	c, ok := f.Interface().(printerstorage.TableConvertor)
	if !ok {
		return nil
	}
	g, _ := c.TableGenerator.(*printers.HumanReadableGenerator)
	return g
}
