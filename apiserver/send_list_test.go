package apiserver

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"knarr/api"
	"knarr/store"
)

// TestListBody takes a list in pieces of each size: it is the same list.
func TestListBody(t *testing.T) {
	gvk := corev1.SchemeGroupVersion.WithKind("ConfigMap")
	for _, count := range []int{0, 1, 2, 40} {
		want, page := corev1.ConfigMapList{Items: []corev1.ConfigMap{}}, &api.Page{Revision: 7, Continue: "more"}
		want.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMapList"))
		want.ResourceVersion, want.Continue = "7", "more"
		for i := range count {
			m := corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("m-", i)}, Data: map[string]string{"k": strings.Repeat("x", i*i)}}
			want.Items = append(want.Items, m)
			m.SetGroupVersionKind(gvk)
			page.Records = append(page.Records, &store.Record{Object: &m})
		}
		for _, f := range []format{jsonFormat{}, protoFormat{}} {
			items := make([][]byte, count)
			for i, rec := range page.Records {
				var err error
				items[i], err = f.raw(rec)
				require.NoError(t, err)
			}
			var whole []byte
			for _, limit := range []int{1 << 20, 1, 2, 3, 5, 7, 100, 1000} {
				inList := 0
				for _, item := range items {
					inList += f.inList(item)
				}
				head, tail, err := f.list(page, inList, gvk)
				require.NoError(t, err)
				body := listBody{rest: head, items: items, tail: tail, open: f.item(gvk)}
				var got []byte
				for more := true; more; {
					before := len(got)
					got, more = body.next(got, limit)
					require.True(t, len(got)-before == limit || !more && len(got)-before < limit)
				}
				if whole == nil {
					whole = got
				}
				require.Equal(t, whole, got, "pieces of %d", limit)
			}
			if _, ok := f.(protoFormat); ok {
				expected, err := want.Marshal()
				require.NoError(t, err)
				require.True(t, bytes.Contains(whole, expected))
				continue
			}
			var got corev1.ConfigMapList
			require.NoError(t, json.Unmarshal(whole, &got))
			require.Equal(t, want, got)
		}
	}
}
