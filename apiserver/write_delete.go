package apiserver

import (
	"bytes"
	"context"
	"net/http"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/util/apihelpers"
)

// delete does what upstream's handler of deletions does, in its order. The answer is the object, in its record, or a status.
// Source: DeleteResource in k8s.io/apiserver/pkg/endpoints/handlers/delete.go.
func (wr *change) delete(ctx context.Context) (runtime.Object, int, error) {
	options, ok := wr.deleteOptions()
	if !ok {
		return nil, 0, wr.refuse()
	}
	out, gone, err := wr.storage.(rest.GracefulDeleter).Delete(ctx, wr.info.Name, wr.mayDelete(options), options)
	code := http.StatusOK
	//lint:ignore SA1019 clients may still send it
	if orphan := options.OrphanDependents; !gone && orphan != nil && !*orphan {
		code = http.StatusAccepted
	}
	return out, code, err
}

// deleteOptions reads the body; false for one with options that are not for every day.
func (wr *change) deleteOptions() (*metav1.DeleteOptions, bool) {
	if known := wr.writer.deletions.Load(); known != nil && known.contentType == wr.contentType && bytes.Equal(known.body, wr.body) {
		return known.options.DeepCopy(), true
	}
	options := &metav1.DeleteOptions{}
	if len(wr.body) > 0 {
		codecs, kind := apihelpers.GetMetaInternalVersionCodecs(), metav1.SchemeGroupVersion.WithKind("DeleteOptions")
		info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), wr.contentType)
		if !ok {
			return nil, false
		}
		obj, _, err := codecs.DecoderToVersion(info.Serializer, metav1.SchemeGroupVersion).Decode(wr.body, &kind, options)
		if err != nil || obj != runtime.Object(options) {
			return nil, false
		}
	}
	if len(options.DryRun) > 0 || options.IgnoreStoreReadErrorWithClusterBreakingPotential != nil || len(validation.ValidateDeleteOptions(options)) > 0 {
		return nil, false
	}
	options.SetGroupVersionKind(metav1.SchemeGroupVersion.WithKind("DeleteOptions"))
	if len(wr.body) <= knownOptionsBytes && options.Preconditions == nil {
		wr.writer.deletions.Store(&knownOptions{wr.contentType, bytes.Clone(wr.body), options.DeepCopy()})
	}
	return options, true
}

// knownOptionsBytes bounds the body that is remembered with its options.
const knownOptionsBytes = 1 << 10

// knownOptions are good options of a deletion, and the body that they were read from: most clients send the same with each. It is immutable.
type knownOptions struct {
	contentType string
	body        []byte
	options     *metav1.DeleteOptions
}

// mayDelete asks the admission plugins. They get the object itself where none that runs would change it.
func (wr *change) mayDelete(options *metav1.DeleteOptions) rest.ValidateObjectFunc {
	plugins := wr.writer.admit
	return func(ctx context.Context, old runtime.Object) error {
		attributes := wr.attributes(nil, old, wr.info.Name, admission.Delete, options)
		if !plugins.onlyRead(attributes) {
			return rest.AdmissionToValidateObjectDeleteFunc(plugins, attributes, wr.scope)(ctx, old)
		}
		if err := plugins.Admit(ctx, attributes, wr.scope); err != nil {
			return err
		}
		return plugins.Validate(ctx, attributes, wr.scope)
	}
}
