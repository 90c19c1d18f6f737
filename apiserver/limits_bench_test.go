package apiserver_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"

	"knarr/client"
)

// BenchmarkFlowControl compares a get by an exempt in-process caller with one that API priority and fairness classifies.
func BenchmarkFlowControl(b *testing.B) {
	c := theCluster(b)
	_, err := c.RbacV1().ClusterRoleBindings().Create(b.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "viewers-"}, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects: []rbacv1.Subject{{Kind: "User", APIGroup: "rbac.authorization.k8s.io", Name: "viewer"}}}, metav1.CreateOptions{})
	require.NoError(b, err)
	for name, u := range map[string]user.Info{
		"exempt":     client.User("admin", user.SystemPrivilegedGroup, user.AllAuthenticated),
		"classified": client.User("viewer", user.AllAuthenticated),
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				req := httptest.NewRequest(http.MethodGet, "/api/v1/namespaces/kube-system/services/kube-dns", nil)
				req.Header.Set("Accept", "application/json")
				w := httptest.NewRecorder()
				c.handler.ServeHTTP(w, req.WithContext(client.WithUser(req.Context(), u)))
				if w.Code != http.StatusOK {
					b.Fatal(w.Code, w.Body.String())
				}
			}
		})
	}
}
