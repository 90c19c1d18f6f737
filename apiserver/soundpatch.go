package apiserver

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// soundPatches answers JSON patches that test a whole object against no value, over which the library of such patches
// falls (a panic, in upstream's server too), as the failed tests that they are.
func soundPatches(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		contentType, _, _ := strings.Cut(req.Header.Get("Content-Type"), ";")
		if req.Method != http.MethodPatch || contentType != string(types.JSONPatchType) {
			h.ServeHTTP(w, req)
			return
		}
		body := req.Body
		// One byte more than is allowed, so that the handler finds what is too large, and errors of reading, by itself.
		data, _ := io.ReadAll(io.LimitReader(body, MaxRequestBodyBytes+1))
		if testsNothing(data) {
			err := fmt.Errorf("testing value %s failed: %w", "", jsonpatch.ErrTestFailed)
			refusal := apierrors.NewGenericServerResponse(http.StatusUnprocessableEntity, "", schema.GroupResource{}, "", err.Error(), 0, false)
			responsewriters.ErrorNegotiated(refusal, legacyscheme.Codecs, schema.GroupVersion{}, w, req)
			return
		}
		req.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(bytes.NewReader(data), body), body}
		h.ServeHTTP(w, req)
	})
}

// testsNothing tells a JSON patch with a test of the whole object that has no value.
func testsNothing(patch []byte) bool {
	operations, err := jsonpatch.DecodePatch(patch)
	if err != nil {
		return false
	}
	for _, op := range operations {
		path, err := op.Path()
		if _, ok := op["value"]; !ok && err == nil && path == "" && op.Kind() == "test" {
			return true
		}
	}
	return false
}
