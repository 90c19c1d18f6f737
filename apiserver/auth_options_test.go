package apiserver_test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"

	"gopkg.in/go-jose/go-jose.v2"
	"gopkg.in/go-jose/go-jose.v2/jwt"

	"knarr/apiserver"
)

// hook answers reviews: it knows the token "remote" as user remote, and lets remote do everything with configmaps.
func hook(t *testing.T) *httptest.Server {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if strings.HasSuffix(req.URL.Path, "/authenticate") {
			var review authenticationv1.TokenReview
			if json.NewDecoder(req.Body).Decode(&review) == nil && review.Spec.Token == "remote" {
				review.Status = authenticationv1.TokenReviewStatus{Authenticated: true, User: authenticationv1.UserInfo{Username: "remote"}}
			}
			_ = json.NewEncoder(w).Encode(review)
			return
		}
		var review authorizationv1.SubjectAccessReview
		if json.NewDecoder(req.Body).Decode(&review) == nil && review.Spec.ResourceAttributes != nil {
			review.Status.Allowed = review.Spec.User == "remote" && review.Spec.ResourceAttributes.Resource == "configmaps"
		}
		_ = json.NewEncoder(w).Encode(review)
	}))
	t.Cleanup(server.Close)
	return server
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func kubeconfigOf(t *testing.T, url string) string {
	return writeFile(t, "hook.kubeconfig", `apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: "`+url+`"}}]
users: [{name: u}]
contexts: [{name: c, context: {cluster: c, user: u}}]
`)
}

func TestWebhooksAuthenticateAndAuthorize(t *testing.T) {
	h := hook(t)
	s := serve(t, func(c *apiserver.Config) {
		c.Options.Authentication.WebHook.ConfigFile, c.Options.Authentication.WebHook.Version = kubeconfigOf(t, h.URL+"/authenticate"), "v1"
		c.Options.Authorization.Modes = append(c.Options.Authorization.Modes, "Webhook")
		c.Options.Authorization.WebhookConfigFile, c.Options.Authorization.WebhookVersion = kubeconfigOf(t, h.URL+"/authorize"), "v1"
	})
	c := newClient(t, true)
	require.Equal(t, 200, s.ask(t, c, request{path: "/api/v1/namespaces/default/configmaps", token: "remote"}).status)
	a := s.ask(t, c, request{path: "/api/v1/namespaces/default/secrets", token: "remote"})
	require.Equal(t, 403, a.status)
	require.Contains(t, a.body, `User \"remote\" cannot list`)
	require.Equal(t, 401, s.ask(t, c, request{path: "/api/v1/namespaces/default/configmaps", token: "unknown"}).status)
	require.Equal(t, 200, s.ask(t, c, request{path: "/api/v1/secrets", token: adminToken}).status)
}

// issuer is an OIDC provider of one key.
func issuer(t *testing.T) (url, ca string, sign func(claims map[string]any) string) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	var server *httptest.Server
	server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if req.URL.Path == "/keys" {
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "1", Algorithm: "RS256", Use: "sig"}}})
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"issuer": server.URL, "jwks_uri": server.URL + "/keys"})
	}))
	t.Cleanup(server.Close)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: "1"}}, nil)
	require.NoError(t, err)
	sign = func(claims map[string]any) string {
		claims["iss"], claims["exp"], claims["iat"] = server.URL, time.Now().Add(time.Hour).Unix(), time.Now().Unix()
		token, err := jwt.Signed(signer).Claims(claims).CompactSerialize()
		require.NoError(t, err)
		return token
	}
	return server.URL, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})), sign
}

// who asks the server for whom it takes the bearer of a token.
func (s *served) who(t *testing.T, c *http.Client, token string) authenticationv1.UserInfo {
	a := s.ask(t, c, request{method: "POST", path: "/apis/authentication.k8s.io/v1/selfsubjectreviews", token: token,
		body: `{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}`, header: withType(jsonType)})
	var review authenticationv1.SelfSubjectReview
	_ = json.Unmarshal([]byte(a.body), &review)
	return review.Status.UserInfo
}

func TestOIDCByFlags(t *testing.T) {
	url, ca, sign := issuer(t)
	s := serve(t, func(c *apiserver.Config) {
		c.Options.Authentication.OIDC = &kubeoptions.OIDCAuthenticationOptions{IssuerURL: url, ClientID: "knarr", CAFile: writeFile(t, "ca.pem", ca), UsernameClaim: "sub",
			UsernamePrefix: "oidc:", GroupsClaim: "groups", GroupsPrefix: "oidc:", SigningAlgs: []string{"RS256"}}
	})
	c := newClient(t, true)
	token := sign(map[string]any{"sub": "ada", "aud": "knarr", "groups": []string{"crew"}})
	require.Eventually(t, func() bool { return s.who(t, c, token).Username == "oidc:ada" }, timeout, 50*time.Millisecond, "the provider is asked at the start")
	require.Contains(t, s.who(t, c, token).Groups, "oidc:crew")
	require.Empty(t, s.who(t, c, sign(map[string]any{"sub": "ada", "aud": "other"})).Username)
}

func TestStructuredConfigurationFiles(t *testing.T) {
	t.Parallel() // upstream asks a new issuer again after ten seconds only
	url, ca, sign := issuer(t)
	config := func(prefix string) string {
		return `apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous: {enabled: true, conditions: [{path: /livez}]}
jwt:
- issuer: {url: "` + url + `", audiences: [knarr], certificateAuthority: ` + string(must(json.Marshal(ca))) + `}
  claimMappings:
    username: {expression: "'` + prefix + `' + claims.sub"}
  userValidationRules: [{expression: "!user.username.startsWith('system:')", message: "reserved"}]
`
	}
	file := writeFile(t, "authentication.yaml", config("first:"))
	authorization := writeFile(t, "authorization.yaml", `apiVersion: apiserver.config.k8s.io/v1
kind: AuthorizationConfiguration
authorizers:
- {type: Node, name: node}
- {type: RBAC, name: rbac}
- type: Webhook
  name: hook
  webhook:
    timeout: 3s
    subjectAccessReviewVersion: v1
    matchConditionSubjectAccessReviewVersion: v1
    failurePolicy: NoOpinion
    authorizedTTL: 1s
    unauthorizedTTL: 1s
    connectionInfo: {type: KubeConfigFile, kubeConfigFile: "`+kubeconfigOf(t, hook(t).URL+"/authorize")+`"}
    matchConditions: [{expression: "request.user.startsWith('re')"}]
`)
	s := serve(t, func(c *apiserver.Config) {
		c.Options.Authentication.AuthenticationConfigFile = file
		c.Options.Authorization.Modes, c.Options.Authorization.AuthorizationConfigurationFile = nil, authorization
	})
	c := newClient(t, true)
	require.Equal(t, 200, s.ask(t, c, request{path: "/livez"}).status)
	require.Equal(t, 401, s.ask(t, c, request{path: "/readyz"}).status, "anonymous only where the file says")
	token := sign(map[string]any{"sub": "ada", "aud": "knarr"})
	require.Eventually(t, func() bool { return s.who(t, c, token).Username == "first:ada" }, timeout, 50*time.Millisecond)
	require.Equal(t, 403, s.ask(t, c, request{path: "/api/v1/secrets", token: token}).status)
	require.NoError(t, os.WriteFile(file, []byte("nonsense"), 0o600))
	require.NoError(t, os.WriteFile(file, []byte(config("second:")), 0o600))
	fresh := sign(map[string]any{"sub": "bob", "aud": "knarr"})
	require.Eventually(t, func() bool { return s.who(t, c, fresh).Username == "second:bob" }, 3*timeout, 50*time.Millisecond, "a changed file is taken over")
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
