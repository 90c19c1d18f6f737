package api

import (
	"testing"

	"github.com/stretchr/testify/require"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/printers"
	printersinternal "k8s.io/kubernetes/pkg/printers/internalversion"
	printerstorage "k8s.io/kubernetes/pkg/printers/storage"
)

// embedding is how upstream's REST types hold their store.
type embedding struct{ *genericregistry.Store }

// TestSharePrinters: types that had no printers of their own answer as well afterwards, by the pointer that they had before.
func TestSharePrinters(t *testing.T) {
	full := printers.NewTableGenerator().With(printersinternal.AddHandlers)
	empty := printers.NewTableGenerator()
	store := func(g printers.TableGenerator) *genericregistry.Store {
		return &genericregistry.Store{TableConvertor: printerstorage.TableConvertor{TableGenerator: g}}
	}
	resources := func(s rest.Storage) []*genericapiserver.APIGroupInfo {
		return []*genericapiserver.APIGroupInfo{{VersionedResourcesStorageMap: map[string]map[string]rest.Storage{"v1": {"pods": s}}}}
	}
	_, err := empty.GenerateTable(&core.PodList{}, printers.GenerateOptions{})
	require.Error(t, err)
	other := &genericregistry.Store{TableConvertor: rest.NewDefaultTableConvertor(core.Resource("pods"))}
	var infos []*genericapiserver.APIGroupInfo
	for _, s := range []rest.Storage{store(full), other, embedding{store(empty)}.Store, &embedding{store(empty)}, &embedding{}} {
		infos = append(infos, resources(s)...)
	}
	sharePrinters(infos)
	table, err := empty.GenerateTable(&core.PodList{}, printers.GenerateOptions{})
	require.NoError(t, err)
	require.NotEmpty(t, table.ColumnDefinitions)
}
