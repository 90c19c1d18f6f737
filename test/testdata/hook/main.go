// Command hook is an admission webhook that denies everything, so that one sees that it was asked.
package main

import (
	"encoding/json"
	"log"
	"net/http"
)

// review is as much of an AdmissionReview as is needed.
type review struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Request    *struct {
		UID string `json:"uid"`
	} `json:"request,omitempty"`
	Response *response `json:"response,omitempty"`
}

type response struct {
	UID     string            `json:"uid"`
	Allowed bool              `json:"allowed"`
	Status  map[string]string `json:"status"`
}

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, req *http.Request) {
		var r review
		if err := json.NewDecoder(req.Body).Decode(&r); err != nil || r.Request == nil {
			http.Error(w, "no review", http.StatusBadRequest)
			return
		}
		r.Response = &response{UID: r.Request.UID, Status: map[string]string{"message": "the webhook was asked"}}
		r.Request = nil
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(r)
	})
	log.Fatal(http.ListenAndServeTLS(":8443", "/tls/tls.crt", "/tls/tls.key", nil))
}
